"""Results as text and as JSON."""

import os
import platform
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from corpora import MIB, Scale
from journeys import TARGETS
from results import Measured, Results

_PACKAGES = (
    "keras-remote-airflow",
    "keras-kinetic",
    "google-cloud-storage",
    "gcsfs",
    "obstore",
    "aiohttp",
    "apache-airflow",
)
_HEADER = (
    "contender",
    "files",
    "seconds",
    "min-max",
    "files/s",
    "MiB/s",
    "x kinetic",
    "client CPU s/1,000",
    "peak MiB",
    "server CPU",
    "",
)


def case_table(case: str, results: Results) -> str:
    """The contenders of one case, fastest first."""
    measured = results.cases.get(case, {})
    most = max((one.files for one in measured.values()), default=0)
    rows = [
        _row(name, one, results.ratio(case, name), one.files < most)
        for name, one in sorted(measured.items(), key=lambda item: item[1].per_file)
    ]
    lines = [case, *_table([_HEADER, *rows])]
    lines += [f"{name} failed: {why}" for name, why in results.failures.get(case, {}).items()]
    return "\n".join(lines)


def targets_table(results: Results) -> str:
    rows: list[tuple[str, ...]] = [("target", "wanted", "measured", "")]
    for target in TARGETS:
        value = target.value(results)
        bound = f"{'>=' if target.at_least else '<='} {target.bound:g} {target.unit}"
        if value is None:
            rows.append((target.text, bound, "-", "not measured"))
        else:
            verdict = "met" if target.is_met(value) else "MISSED"
            rows.append((target.text, bound, f"{value:.3g} {target.unit}", verdict))
    return "\n".join(_table(rows))


def to_json(results: Results, scale: Scale, rounds: int) -> dict[str, Any]:
    targets = [(target, target.value(results)) for target in TARGETS]
    return {
        "format_version": 1,
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "cpus": os.cpu_count(),
            "system": platform.system(),
            "architecture": platform.machine(),
            "python": platform.python_version(),
        },
        "packages": {name: metadata.version(name) for name in _PACKAGES},
        "scale": scale.name,
        "rounds": rounds,
        "cases": {
            case: {
                name: {**one.to_json(), "times_kinetic": _rounded(results.ratio(case, name))}
                for name, one in measured.items()
            }
            for case, measured in results.cases.items()
        },
        "failures": results.failures,
        "targets": [
            {
                "target": target.text,
                "at_least" if target.at_least else "at_most": target.bound,
                "unit": target.unit,
                "measured": _rounded(value),
                "met": None if value is None else target.is_met(value),
            }
            for target, value in targets
        ],
    }


def _row(name: str, one: Measured, ratio: float | None, is_part: bool) -> tuple[str, ...]:
    notes = [
        "a part of the data, rates compare" if is_part else "",
        "the server limits" if one.server_limits else "",
    ]
    low, high = min(one.seconds), max(one.seconds)
    return (
        name,
        f"{one.files:,}" if one.files else "",
        f"{one.median:.3f}",
        f"{low:.3f}-{high:.3f}",
        f"{one.rate:,.0f}" if one.files else "",
        f"{one.throughput / MIB:,.1f}" if one.bytes else "",
        f"{ratio:.2f}" if ratio else "",
        f"{one.cpu_per_1000:.3f}" if one.files else "",
        f"{one.peak / MIB:.0f}",
        f"{one.server_share:.0%}" if any(one.server_cpus) else "",
        "; ".join(filter(None, notes)),
    )


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], tuple("-" * width for width in widths), *rows[1:]]
    last = len(widths) - 1
    return [
        "  ".join(
            cell.ljust(width) if number in (0, last) else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
