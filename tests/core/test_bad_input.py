"""Bad input: one clear error that names the thing, and nothing written.

Most data here is made of what a file system can hold and Cloud Storage, or a hash, cannot.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from keras_remote_airflow import Data, make_data_ref
from keras_remote_airflow.core.datasets.upload import upload
from keras_remote_airflow.core.errors import InvalidInputError

from .conftest import writes
from .test_layout import BAD_BUCKETS, BAD_NAMESPACES

pytestmark = pytest.mark.timeout(60)  # opening a FIFO or a device may wait for ever


def _socket(path: Path) -> None:
    # A path of more than 107 bytes is no address: bind from within the folder.
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(path.parent)
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)


def _file(name: str | bytes) -> Callable[[Path], None]:
    def make(root: Path) -> None:
        path = os.path.join(os.fsencode(root), os.fsencode(name))
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(b"x")

    return make


# What to put into a good directory, and what the error must say.
BAD_CONTENTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "FIFO": (lambda root: os.mkfifo(root / "pipe"), r"found a FIFO, .*/sub/pipe"),
    "linked FIFO": (
        lambda root: (os.mkfifo(root.parent / "f"), (root / "link").symlink_to(root.parent / "f")),
        r"found a FIFO, .*(link|/f)",
    ),
    "socket": (lambda root: _socket(root / "sock"), r"found a socket, .*/sub/sock"),
    "device": (
        lambda root: (root / "null").symlink_to("/dev/null"),
        r"found a device, .*/sub/null",
    ),
    "endless device": (
        lambda r: (r / "zero").symlink_to("/dev/zero"),
        r"found a device, .*/sub/zero",
    ),
    "broken link": (
        lambda root: (root / "broken").symlink_to("gone"),
        r"broken link: .*/sub/broken points to gone",
    ),
    "link to itself": (lambda root: (root / "loop").symlink_to("loop"), r"link.*/sub/loop"),
    "links in a ring": (
        lambda root: ((root / "ping").symlink_to("pong"), (root / "pong").symlink_to("ping")),
        r"link.*/sub/p[io]ng",
    ),
    "name not UTF-8": (_file(b"caf\xe9.csv"), r"not UTF-8.*caf\\xe9\.csv"),
    "folder not UTF-8": (_file(b"caf\xe9/a.csv"), r"not UTF-8.*caf\\xe9/a\.csv"),
    "line feed": (_file("a\nb"), r"unsafe relative path 'sub/a\\nb'"),
    "carriage return": (_file("a\rb"), r"unsafe relative path 'sub/a\\rb'"),
    "line feed in a folder": (_file("a\nb/c"), r"unsafe relative path 'sub/a\\nb/c'"),
    "long name": (_file("/".join(["d" * 200] * 5)), r"object name too long.*dddd.*1024"),
    "long name in UTF-8": (_file("/".join(["é" * 120] * 4)), r"object name too long.*éééé.*1024"),
    "marker": (_file("../.cache_marker"), r"reserved.*/data/\.cache_marker"),
    "drive letter": (_file("../C:/a.csv"), r"unsafe relative path 'C:/a\.csv'"),
    "drive letter alone": (_file("../c:"), r"unsafe relative path 'c:'"),
    "Windows path": (_file("../D:\\a.csv"), r"unsafe relative path 'D:\\\\a\.csv'"),
}


@pytest.fixture
def good(tree):
    return tree({"a.csv": "1", "sub/b.csv": "2", "z.csv": "3"})


@pytest.mark.parametrize("case", BAD_CONTENTS)
def test_bad_content_is_named_and_nothing_is_written(case, good, gcs_server, gcs_bucket):
    spoil, message = BAD_CONTENTS[case]
    spoil(good / "sub")
    with pytest.raises(InvalidInputError, match=message) as caught:
        upload(gcs_bucket, str(good))
    assert "".join(traceback.format_exception(caught.value)).count("Traceback (") == 1
    assert gcs_server.requests == []


def test_the_same_directory_without_them_is_fine(good, gcs_bucket):
    assert upload(gcs_bucket, str(good)).files == 3


SINGLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, r"does not exist: .*/thing"),
    "FIFO": (os.mkfifo, r"found a FIFO, .*/thing"),
    "socket": (_socket, r"found a socket, .*/thing"),
    "device": (lambda path: path.symlink_to("/dev/zero"), r"found a device, .*/thing"),
    "broken link": (lambda path: path.symlink_to("gone"), r"broken link: .*/thing points to gone"),
    "link to itself": (lambda path: path.symlink_to(path), r"link: .*/thing"),
}


@pytest.mark.parametrize("case", SINGLES)
def test_bad_single_path_is_named_and_nothing_is_written(case, tmp_path, gcs_server, gcs_bucket):
    make, message = SINGLES[case]
    make(tmp_path / "thing")
    with pytest.raises(InvalidInputError, match=message) as caught:
        upload(gcs_bucket, str(tmp_path / "thing"))
    assert "".join(traceback.format_exception(caught.value)).count("Traceback (") == 1
    assert gcs_server.requests == []


@pytest.mark.parametrize("name", [b"caf\xe9.csv", b"a\nb", b"a\rb", b".cache_marker", b"C:"])
def test_bad_name_of_a_single_file_is_named(name, tmp_path, gcs_server, gcs_bucket):
    _file(name)(tmp_path)
    with pytest.raises(InvalidInputError):
        upload(gcs_bucket, os.fsdecode(os.path.join(os.fsencode(tmp_path), name)))
    assert gcs_server.requests == []


def test_special_files_are_never_opened(tmp_path):
    for make in (os.mkfifo, _socket, lambda path: path.symlink_to("/dev/zero")):
        root = Path(tempfile.mkdtemp(dir=tmp_path))
        make(root / "special")
        # In a process of its own: an audit hook stays for good.
        script = """
import sys
from keras_remote_airflow.core.errors import InvalidInputError
from keras_remote_airflow.core.disk.hashing import take_snapshot
opened = []
sys.addaudithook(lambda event, args: opened.append(args[0]) if event == "open" else None)
try:
    take_snapshot(sys.argv[1])
except InvalidInputError as exc:
    assert "found a" in str(exc) and "special" in str(exc), exc
else:
    raise AssertionError("it was hashed")
assert not [path for path in opened if "special" in str(path)], opened
"""
        done = subprocess.run(
            [sys.executable, "-c", script, str(root)], capture_output=True, text=True, timeout=30
        )
        assert done.returncode == 0, done.stderr


# What of a directory is locked and must be named, its mode, and which path in it is the data.
UNREADABLE = {
    "file": ("secret.csv", 0, ""),
    "folder": ("locked", 0, ""),
    "folder without search": ("locked", 0o400, ""),
    "folder above": ("locked", 0o600, "locked/sub"),
    "folder above a link's target": ("locked", 0o600, "link"),
    "folder above the target of a link in it": ("locked", 0o600, "links"),
}
UPLOAD_AS_NOBODY = """
import os, sys
from google.cloud import storage
from keras_remote_airflow.core.datasets.upload import upload
from keras_remote_airflow.core.errors import InvalidInputError
import keras_remote_airflow.core.disk.hashing, keras_remote_airflow.core.cloud.gcs
if os.getuid() == 0:  # after which Python's own files may be out of reach
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
for path in sys.argv[2:]:
    try:
        upload(sys.argv[1], path)
    except InvalidInputError as exc:
        print(exc)
"""


def test_unreadable_content_is_named_and_nothing_is_written(gcs_server, gcs_bucket):
    # Not in tmp_path, which only its owner can enter; and as nobody: root may read everything.
    base = Path(tempfile.mkdtemp())
    try:
        base.chmod(0o755)
        for case, (locked, mode, _) in UNREADABLE.items():
            (base / case / "locked" / "sub").mkdir(parents=True)
            (base / case / "links").mkdir()
            for link in ("link", "links/link"):
                (base / case / link).symlink_to(base / case / "locked/b.csv")
            for name in ("a.csv", "secret.csv", "locked/b.csv"):
                (base / case / name).write_text("x")
            (base / case / locked).chmod(mode)
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                UPLOAD_AS_NOBODY,
                gcs_bucket,
                *(str(base / case / data) for case, (*_, data) in UNREADABLE.items()),
            ],
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.returncode == 0, done.stderr
        errors = done.stdout.splitlines()
        assert len(errors) == len(UNREADABLE)
        for error, (case, (locked, *_)) in zip(errors, UNREADABLE.items(), strict=True):
            assert re.search(rf"permission denied.*{base / case / locked}\b", error)
        assert gcs_server.requests == []
    finally:
        for case in UNREADABLE:
            (base / case / "locked").chmod(0o700)
        shutil.rmtree(base)


@pytest.mark.parametrize("bucket", BAD_BUCKETS, ids=repr)
def test_bad_bucket_is_refused_before_anything_is_read(bucket, gcs_server):
    with pytest.raises(InvalidInputError, match="invalid bucket name"):
        upload(bucket, "/not/even/there")
    assert gcs_server.requests == []


@pytest.mark.parametrize("namespace", BAD_NAMESPACES, ids=repr)
def test_bad_namespace_is_refused_before_anything_is_read(namespace, gcs_server, gcs_bucket):
    with pytest.raises(InvalidInputError, match="invalid namespace_prefix"):
        upload(gcs_bucket, "/not/even/there", None, namespace)
    assert gcs_server.requests == []


def test_namespace_that_leaves_no_room_is_refused_before_anything_is_written(
    good, gcs_server, gcs_bucket
):
    for length in (935, 940, 1100):
        with pytest.raises(InvalidInputError, match="too long"):
            upload(gcs_bucket, str(good), None, "n" * length)
    assert writes(gcs_server) == []


@pytest.mark.parametrize("path", ["", "\0", "a\0b", "\ud800"])
def test_path_that_no_file_can_have_is_a_value_error(path):
    with pytest.raises(InvalidInputError, match=r"empty|does not exist"):
        Data(path)


@pytest.mark.parametrize("uri", ["gs://", "gs:///x", "gs://Bad Bucket/x", "gs://demo/\udcff.txt"])
@pytest.mark.parametrize("take", [Data, lambda uri: make_data_ref(uri, True)], ids=["Data", "ref"])
def test_malformed_gcs_uri_is_refused(uri, take):
    with pytest.raises(InvalidInputError, match=r"bucket name|Cloud Storage URI"):
        take(uri)


@pytest.mark.parametrize(
    ("counts", "found"),
    [
        ({"min_files": "2"}, "min_files '2'"),
        ({"min_files": -3}, "min_files -3"),
        ({"min_files": None}, "min_files None"),
        ({"allow_empty": "no"}, "allow_empty is 'no'"),
    ],
)
def test_numbers_of_files_that_are_none_are_refused_before_anything_is_read(counts, found):
    with pytest.raises(InvalidInputError, match=found):
        upload("test-bucket", "/not/even/there", **counts)
