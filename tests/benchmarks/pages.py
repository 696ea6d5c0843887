"""The figures of docs/benchmark.json, as README.md and docs/benchmarks.md show them.

    python tests/benchmarks/pages.py       writes them there, if all cases were measured

A test of the pages checks that they say what the file says.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
FIGURES = REPOSITORY / "docs/benchmark.json"

_MIB = 1 << 20
_DATA = {
    "S": "20,000 files of 4 KiB",
    "S+30ms": "5,000 of them, 30 ms added to each request",
    "M": "200 files of 4 MiB",
    "L": "one file of 2 GiB",
}
_STEPS = {
    "hash": "content hash",
    "upload": "first upload",
    "unchanged": "unchanged, with `hash_index`",
    "materialize": "`materialize`",
}


def main() -> None:
    figures = json.loads(FIGURES.read_text())
    if missing := [one["target"] for one in figures["targets"] if one["measured"] is None]:
        sys.exit(f"{FIGURES} lacks: {', '.join(missing)}. The pages were left as they are.")
    for page, (pattern, write) in SECTIONS.items():
        path = REPOSITORY / page
        before, after = re.split(pattern, path.read_text(), maxsplit=1, flags=re.DOTALL)
        path.write_text(before + write(figures) + after)


def write_overview(figures: dict[str, Any]) -> str:
    """The README's table: ours, and how many times as fast as keras-kinetic."""
    cases, machine, packages = figures["cases"], figures["machine"], figures["packages"]
    ours, kinetic = cases["upload/S"]["ours"], cases["upload/S"]["kinetic"]
    large = {name: _mib(one) for name, one in cases["upload/L"].items()}
    rows = [["", *_STEPS.values()], ["---"] * (1 + len(_STEPS))]
    rows += [
        [text, *(_speed(cases.get(f"{step}/{data}", {})) for step in _STEPS)]
        for data, text in _DATA.items()
    ]
    return f"""## How fast it is

Each cell shows seconds, and **how many times as fast** this is as keras-kinetic \
{packages["keras-kinetic"]}. The figures are
medians of {_rounds(figures)} of `make bench` against a local server, on \
{machine["cpus"]} cores, {figures["made_at"][:10]}, with
Python {machine["python"]}, aiohttp {packages["aiohttp"]} and google-cloud-storage \
{packages["google-cloud-storage"]} ([all figures, and their limits](docs/benchmarks.md)):

{_markdown(rows)}

Uploading a small object takes {ours["client_cpu_seconds_per_1000"]:.2f} ms of client CPU; \
keras-kinetic takes {kinetic["client_cpu_seconds_per_1000"]:.1f} ms. Uploading 2 GiB
takes {large["ours"]} MiB of memory; keras-kinetic takes {large["kinetic"]} MiB. Hashing a million \
files, and finding out which of them
to send, takes {_mib(cases["plan/N1M"]["ours"])} MiB.
"""


def write_figures(figures: dict[str, Any]) -> str:
    """All that was measured: the targets, then a table for each case of several contenders."""
    machine = figures["machine"]
    targets = [["", "wanted", "measured"], ["---"] * 3]
    for target in figures["targets"]:
        bound = f"≥ {target['at_least']}" if "at_least" in target else f"≤ {target['at_most']}"
        targets.append([target["target"], f"{bound} {target['unit']}", _number(target["measured"])])
    packages = ", ".join(
        f"{name} {version}"
        for name, version in figures["packages"].items()
        if name != "keras-remote-airflow"
    )
    parts = [
        f"""## The figures

Medians of {_rounds(figures)} (three times as many for quick cases) on \
{machine["cpus"]} cores, {machine["system"]} {machine["architecture"]}, {figures["made_at"][:10]},
with Python {machine["python"]}, {packages}.

{_markdown(targets)}
"""
    ]
    for case, measured in figures["cases"].items():
        if len(measured) > 1:
            parts.append(f"### {case}\n\n{_markdown(_contenders(measured))}\n")
    return "\n".join(parts)


def _rounds(figures: dict[str, Any]) -> str:
    return "1 round" if figures["rounds"] == 1 else f"{figures['rounds']} rounds"


def _contenders(measured: dict[str, Any]) -> list[list[str]]:
    header = ["", "seconds", "files", "files/s", "x kinetic", "CPU ms a file", "peak MiB", "server"]
    rows = [header, ["---"] * len(header)]
    for name, one in sorted(measured.items(), key=lambda item: -(item[1]["times_kinetic"] or 0)):
        low, high = min(one["seconds"]), max(one["seconds"])
        rows.append(
            [
                name,
                f"{_number(one['median_seconds'])} ({_number(low)} to {_number(high)})",
                _number(one["files"]),
                _number(one["files_per_second"]),
                _number(one["times_kinetic"]),
                _number(one["client_cpu_seconds_per_1000"]),
                str(_mib(one)),
                f"{one['server_cpu_share']:.0%}" if one["server_cpu_share"] else "",
            ]
        )
    return rows


def _speed(case: dict[str, Any]) -> str:
    if "ours" not in case:
        return ""
    seconds, ratio = case["ours"]["median_seconds"], case["ours"]["times_kinetic"]
    took = f"{seconds * 1000:.0f} ms" if seconds < 0.1 else f"{seconds:.2f} s"
    return f"{took}, **{ratio:.0f} x**" if ratio >= 9.95 else f"{took}, **{ratio:.1f} x**"


def _number(value: float | None) -> str:
    if value is None:  # kinetic could not be measured
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _mib(one: dict[str, Any]) -> int:
    return round(one["peak_bytes"] / _MIB)


def _markdown(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# Page: (what is replaced, what by).
SECTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "README.md": (r"## How fast it is\n.*?(?=\n!\[)", write_overview),
    "docs/benchmarks.md": (r"## The figures\n.*", write_figures),  # to the end
}

if __name__ == "__main__":
    main()
