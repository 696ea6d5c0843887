"""The repository's own lint rule: tests replace no private names of the package."""

import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "lint_tests.py"
HEADER = """
import keras_remote_airflow.core.progress
from keras_remote_airflow.core import layout
from kinetic import storage
"""
X = "keras_remote_airflow.core.x"

find_replaced = runpy.run_path(str(SCRIPT))["find_replaced"]


@pytest.mark.parametrize(
    ("line", "name"),
    [
        (f'monkeypatch.setattr("{X}._NAME", 1)', f"{X}._NAME"),
        ('monkeypatch.setattr(layout, "_NAME", 1)', "layout._NAME"),
        ('monkeypatch.setattr(layout._Class, "read", 1)', "layout._Class.read"),
        ('monkeypatch.delattr(layout, "_NAME")', "layout._NAME"),
        (f'mock.patch("{X}._name")', f"{X}._name"),
        ('mock.patch.object(made_here, "_name")', "made_here._name"),
        ("layout._NAME = 1", "layout._NAME"),
        ("layout._NAME += 1", "layout._NAME"),
        ("made_here.store._transport.call = print", "made_here.store._transport.call"),
        ('object.__setattr__(made_here, "_name", 1)', "made_here._name"),
    ],
)
def test_a_private_name_of_ours_is_found(line, name):
    assert list(find_replaced(HEADER + line)) == [(5, name)]


@pytest.mark.parametrize(
    "line",
    [
        f'monkeypatch.setattr("{X}.NAME", 1)',
        'monkeypatch.setattr(layout, "NAME", 1)',
        'monkeypatch.setattr("tempfile._name", 1)',
        'monkeypatch.setattr(storage, "_cached_clients", {})',
        'monkeypatch.setattr(layout, "__version__", 1)',
        "self._name = 1",
        "print(layout._NAME)",
    ],
)
def test_what_is_public_or_not_ours_or_only_read_is_not(line):
    assert list(find_replaced(HEADER + line)) == []
