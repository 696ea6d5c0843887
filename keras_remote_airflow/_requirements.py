"""Checks that what the extra `airflow` installs is there.

Reads package metadata only. Airflow calls `provider_info` even where it is too old.
"""

import re
from importlib.metadata import PackageNotFoundError, distribution

# The lower bounds of the extra in pyproject.toml.
MIN_AIRFLOW = "2.11"
MIN_GOOGLE_PROVIDER = "19"

_GOOGLE_PROVIDER = "apache-airflow-providers-google"


def missing_requirement() -> str | None:
    """Say in one line what to install, or return None if nothing is missing or too old."""
    # Airflow 3 is in apache-airflow-core; apache-airflow only requires that.
    airflow = _installed_version("apache-airflow-core") or _installed_version("apache-airflow")
    for name, found, minimum in (
        ("apache-airflow", airflow, MIN_AIRFLOW),
        (_GOOGLE_PROVIDER, _installed_version(_GOOGLE_PROVIDER), MIN_GOOGLE_PROVIDER),
    ):
        if found is None or _numbers(found) < _numbers(minimum):
            return (
                f"keras_remote_airflow needs {name} {minimum} or newer for its operators and "
                f"sensors, found {found or 'none'}: pip install 'keras-remote-airflow[airflow]'"
            )
    return None


def _installed_version(name: str) -> str | None:
    try:
        found = distribution(name)
    except PackageNotFoundError:
        return None
    # `found.version` parses all of the metadata, a README of many pages included.
    line = re.search(r"^Version: *(\S+)", found.read_text("METADATA") or "", re.MULTILINE)
    return line[1] if line else found.version


def _numbers(version: str) -> list[int]:
    """Return major and minor version: [2, 11] for "2.11.0+composer"."""
    return [int(number) for number in re.findall(r"\d+", version)[:2]]
