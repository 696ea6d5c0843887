"""The project comes from one place, in one order."""

from pathlib import Path

import pytest

import keras_remote_airflow
from keras_remote_airflow import get_default_project
from keras_remote_airflow.core.cloud.bucket import resolve_project

VARIABLES = ("KERAS_REMOTE_PROJECT", "GOOGLE_CLOUD_PROJECT")


@pytest.mark.parametrize(
    ("ours", "googles", "project"),
    [
        ("ours", "googles", "ours"),
        ("ours", None, "ours"),
        (None, "googles", "googles"),
        ("", "googles", "googles"),
        (None, None, None),
        ("", "", None),
    ],
)
def test_our_variable_goes_before_googles_and_empty_is_unset(monkeypatch, ours, googles, project):
    for name, value in zip(VARIABLES, (ours, googles), strict=True):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert get_default_project() == project


def test_a_named_project_goes_before_the_environment(monkeypatch):
    monkeypatch.setenv("KERAS_REMOTE_PROJECT", "environment")
    assert resolve_project(None, "", "second", "third") == "second"
    assert resolve_project(None, "") == "environment"


def test_only_one_module_reads_the_variables():
    package = Path(keras_remote_airflow.__file__).parent
    readers = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for name in VARIABLES
        # In quotes: docstrings may name them, code has to quote them.
        if any(f"{quote}{name}{quote}" in path.read_text() for quote in "\"'")
    }
    assert readers == {"core/cloud/bucket.py"}
