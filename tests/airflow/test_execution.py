"""What a retry takes for the work of an earlier try of its run."""

from datetime import UTC, datetime
from types import SimpleNamespace

import pytest

from keras_remote_airflow.execution import is_work_of_an_earlier_try

BEGAN = datetime(2026, 1, 31, 12, 0, 0, 500_000, UTC)


def context(try_number):
    return {
        "ti": SimpleNamespace(try_number=try_number),
        "dag_run": SimpleNamespace(start_date=BEGAN),
    }


@pytest.mark.parametrize(
    ("happened_at", "expected"),
    [
        ("2026-01-31T12:00:01Z", True),
        ("2026-01-31T12:00:00Z", True),  # receipts know no fractions of a second
        ("2026-01-31T11:59:59Z", False),
        ("2026-01-31T13:00:01+01:00", True),
        (None, False),
        ("", False),
        ("yesterday", False),
        ("2026-01-31T12:00:01", False),
    ],
)
def test_only_what_happened_since_the_run_began_counts(happened_at, expected):
    assert is_work_of_an_earlier_try(context(2), happened_at) is expected


def test_a_first_try_has_no_earlier_one():
    assert not is_work_of_an_earlier_try(context(1), "2026-01-31T12:00:01Z")
