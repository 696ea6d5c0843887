"""Importing the package is cheap, and core needs no Airflow."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import keras_remote_airflow


def run(script: str, *args: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *args], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_loads_none_of_its_big_dependencies():
    script = """
import sys
before = set(sys.modules)  # some environments load parts of google at start-up
import keras_remote_airflow
loaded = set(sys.modules) - before
print(sorted(m for m in loaded if m.split(".")[0] in ("airflow", "aiohttp", "google")))
assert dir(keras_remote_airflow), "and listing its names loads nothing either"
print(len(set(sys.modules) - before - loaded))
"""
    assert run(script).split("\n")[:2] == ["[]", "0"]


def imported_for_type_checkers() -> dict[str, str]:
    """Return name to module of what the package imports where only type checkers look."""
    source = Path(keras_remote_airflow.__file__).read_text(encoding="utf-8")
    (block,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    return {
        alias.name: str(node.module)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def test_every_public_name_is_what_type_checkers_take_it_for():
    seen = imported_for_type_checkers()
    assert {*seen, "__version__"} == set(keras_remote_airflow.__all__)
    prefix = f"{keras_remote_airflow.__name__}."
    assert {name: prefix + home for name, home in keras_remote_airflow._HOME.items()} == seen
    for name, home in seen.items():
        if home.startswith(f"{prefix}core."):  # the others would import Airflow
            assert getattr(keras_remote_airflow, name) is getattr(import_module(home), name)


def test_public_names_are_listed_in_order():
    names = keras_remote_airflow.__all__
    assert sorted(names) == names


@pytest.mark.parametrize("name", ["Data", "find", "make_data_ref", "materialize", "upload_data"])
def test_importing_a_name_does_not_load_what_talks_to_cloud_storage(name):
    script = f"""
import sys
from keras_remote_airflow import {name}
heavy = "aiohttp", "google_crc32c", "google.cloud.storage", "requests", "tqdm"
print([module for module in heavy if module in sys.modules])
"""
    assert run(script).strip() == "[]"


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        keras_remote_airflow.no_such_name  # noqa: B018 - looking it up is the point


def test_core_uploads_and_materializes_where_airflow_cannot_be_imported(tree, bucket, tmp_path):
    root = tree({"train.csv": "t", "sub/eval.csv": "e"})
    script = """
import sys

class NoAirflow:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "airflow":
            raise ImportError(f"{name} was imported")

sys.meta_path.insert(0, NoAirflow())
from keras_remote_airflow import Data, find, is_data_ref, make_data_ref, materialize, upload_data

bucket, path, dest = sys.argv[1:]
for layout in ("keras_remote", "kinetic"):
    uri = upload_data(bucket, Data(path), layout=layout)
    assert find(bucket, uri.rpartition("/")[2], layout=layout).files == 2
ref = make_data_ref(uri, True)
assert is_data_ref(ref)
print(materialize(ref, dest))
assert not [name for name in sys.modules if name.partition(".")[0] == "airflow"]
"""
    dest = str(tmp_path / "copy")
    assert run(script, bucket.name, str(root), dest).strip() == dest
    assert (tmp_path / "copy" / "sub" / "eval.csv").read_text() == "e"
