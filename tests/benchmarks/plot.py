"""The picture for the README: how fast, and at what cost."""

from pathlib import Path

import matplotlib as mpl
from results import Results

mpl.use("Agg")
from matplotlib import pyplot as plt

_COLOURS = {
    "ours": "#d9480f",
    "kinetic": "#1c7ed6",
    "transfer_manager": "#74c0fc",
    "gcsfs": "#2f9e44",
    "obstore": "#868e96",
    "plain loop": "#ced4da",
    "Airflow operator": "#f2b705",
}
_LABELS = {"ours": "keras_remote_airflow", "kinetic": "keras-kinetic 0.0.4"}
_RATES = {
    "upload/S": "4 KiB",
    "upload/S+30ms": "4 KiB,\n30 ms per request",
    "upload/W": "digits, 0.1 KiB",
    "upload/M": "4 MiB",
}
_COSTS = ("upload/W", "upload/S", "upload/M", "upload/L")


def draw(results: Results, path: Path) -> None:
    """Write a PNG with two panels: objects a second, and client CPU against file size."""
    figure, (rates, costs) = plt.subplots(
        1, 2, figsize=(12, 4.8), layout="constrained", width_ratios=(3, 2)
    )
    _draw_rates(results, rates)
    _draw_costs(results, costs)
    handles, labels = rates.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=7, frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def _draw_rates(results: Results, axes: plt.Axes) -> None:
    cases = [case for case in _RATES if case in results.cases]
    width = 0.8 / len(_COLOURS)
    for number, (name, colour) in enumerate(_COLOURS.items()):
        found = [(place, results.get(case, name)) for place, case in enumerate(cases)]
        points = [(place, one.rate) for place, one in found if one]
        if not points:
            continue
        bars = axes.bar(
            [place + (number - 3) * width for place, _ in points],
            [rate for _, rate in points],
            width,
            color=colour,
            label=_LABELS.get(name, name),
        )
        axes.bar_label(bars, fmt="{:,.0f}", fontsize=7, rotation=90, padding=2)
    axes.set_xticks(range(len(cases)), [_RATES[case] for case in cases])
    axes.set_yscale("log")
    axes.margins(y=0.18)
    axes.set_title("Objects uploaded per second (more is better)", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_costs(results: Results, axes: plt.Axes) -> None:
    for name, colour in _COLOURS.items():
        found = [results.get(case, name) for case in _COSTS]
        points = [(one.bytes / one.files, one.cpu_per_1000 / 1000) for one in found if one]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = {1 << 7: "128 B", 1 << 12: "4 KiB", 1 << 22: "4 MiB", 1 << 31: "2 GiB"}
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.set_xlabel("size of a file")
    axes.set_title("Client CPU seconds per object (less is better)", fontsize=11)
    axes.grid(True, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
