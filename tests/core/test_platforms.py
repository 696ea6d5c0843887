"""Core works where Linux's own calls are missing; Windows is told what to do instead."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from keras_remote_airflow import upload_data

from . import reference
from .conftest import on_disk

WITHOUT_LINUX = Path(__file__).parents[1] / "without_linux"


def run(script: str, *args: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *args],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | env,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_files_are_hashed_and_a_destination_filled_without_what_only_linux_has(tree, tmp_path):
    root = tree({"a": "1", "sub/b": bytes(300_000)})
    script = """
import fcntl, os, sys
from keras_remote_airflow.core.disk.destination import put
from keras_remote_airflow.core.disk.partial import locked, partial_name
from keras_remote_airflow.core.disk.hashing import take_snapshot
assert not any(map(hasattr, (os, os, fcntl), ("O_PATH", "sched_getaffinity", "flock")))
root, index, dest = sys.argv[1:]
print(take_snapshot(root).content_hash, take_snapshot(root, index).content_hash)
partial = os.path.join(os.path.dirname(dest), partial_name(dest))
with locked(partial):
    data = os.path.join(partial, "data")
    os.mkdir(data)
    open(os.path.join(data, "file"), "w").close()
    put(data, dest)
print(os.listdir(dest))
"""
    path = os.pathsep.join(filter(None, [str(WITHOUT_LINUX), os.environ.get("PYTHONPATH")]))
    said = run(script, str(root), str(tmp_path / "index"), str(tmp_path / "dest"), PYTHONPATH=path)
    expected = reference.content_hash(str(root))
    assert said.split() == [expected, expected, "['file']"]


# What keeps Python from going over to UTF-8 by itself.
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0"}


def test_objects_and_copies_have_the_same_names_whatever_the_locale(tree, tmp_path, gcs_bucket):
    root = tree({"é": "1", "ü/日本": "2"}, "données")
    script = """
import json, os, sys
from keras_remote_airflow import make_data_ref, materialize, upload_data
assert sys.getfilesystemencoding() != "utf-8"
bucket, root, single, dest = json.loads(sys.argv[1])
for path, is_dir in ((root, True), (single, False)):
    uri = upload_data(bucket, path)
    copy = materialize(make_data_ref(uri, is_dir), dest if is_dir else dest + "-1")
    os.stat(copy)
    assert upload_data(bucket, copy) == uri
    print(uri)
"""
    paths = [str(root), str(root / "é"), str(tmp_path / "çopie")]
    uris = run(script, json.dumps([gcs_bucket, *paths]), **ASCII).split()
    assert uris == [upload_data(gcs_bucket, paths[0]), upload_data(gcs_bucket, paths[1])]
    assert on_disk(tmp_path / "çopie") == on_disk(root)
    assert on_disk(tmp_path / "çopie-1") == {"é": b"1"}


# As on Windows: the name of the system, a module that is missing, and some calls.
ON_WINDOWS = """
import os, sys
import dataclasses, json, logging, re, urllib.parse  # Python's own go on as on this system
import keras_remote_airflow
sys.modules["fcntl"] = None
for name in ("O_DIRECTORY", "O_NONBLOCK", "O_CLOEXEC", "getuid", "pread"):
    delattr(os, name)
os.name = "nt"
"""


@pytest.mark.parametrize(
    "statement",
    [
        "import keras_remote_airflow.core.disk.hashing",
        "import keras_remote_airflow.core.cloud.bucket",
        "from keras_remote_airflow import upload_data",
        "from keras_remote_airflow import materialize",
        "keras_remote_airflow.Data(__import__('sys').executable).content_hash()",
    ],
)
def test_windows_is_told_to_use_wsl(statement):
    script = f"""{ON_WINDOWS}
try:
    {statement}
except ImportError as exc:
    print(exc)
"""
    [line] = run(script).splitlines()
    assert "WSL" in line


def test_refs_and_layouts_are_read_on_windows_too():
    script = f"""{ON_WINDOWS}
from keras_remote_airflow import make_data_ref, is_data_ref
from keras_remote_airflow.core.refs import parse_data_ref
import keras_remote_airflow.core.layout
ref = make_data_ref("gs://bucket/default/data-cache/" + "0" * 64, True)
print(is_data_ref(ref), parse_data_ref(ref).cache_key.content_hash)
"""
    assert run(script).split() == ["True", "0" * 64]
