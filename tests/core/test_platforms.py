"""Core works where Linux's own calls are missing; Windows is told what to do instead."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from . import reference

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
from keras_remote_airflow.core.disk.destination import locked, partial_name, put
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
