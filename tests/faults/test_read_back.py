"""Guarantee 5 on reading: what is materialized is what was hashed, or there is an error."""

import os
import resource
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faultkit import (
    BIG,
    BUCKET,
    FAST,
    Job,
    content,
    do_materialize,
    do_upload,
    killed_at_exit,
    make_tree,
    read_tree,
    small_files,
    wait_until,
)

from keras_remote_airflow.core.cloud.policy import RetryPolicy
from keras_remote_airflow.core.disk.partial import partial_name
from keras_remote_airflow.core.errors import IntegrityError, InvalidInputError, KerasRemoteError
from keras_remote_airflow.testing import Fault, StorageServer

FILES = small_files(4) | {"big": content(BIG)}
VICTIM = "part-1/001.bin"
PATIENT = RetryPolicy(stall_timeout=300)


@pytest.fixture
def uploaded(server: StorageServer, tmp_path: Path) -> str:
    """The URI of `FILES`, published."""
    return do_upload(server.url, make_tree(tmp_path / "data", FILES)).gcs_uri


def name_of(uri: str, relative: str) -> str:
    return uri.removeprefix(f"gs://{BUCKET}/") + "/" + relative


def left(tmp_path: Path) -> set[str]:
    """What is there beside the data."""
    return {path.name for path in tmp_path.iterdir()} - {"data"}


TAMPERINGS: dict[str, tuple[Callable[[StorageServer, str], Any], str]] = {
    "altered": (lambda s, u: s.put(BUCKET, name_of(u, VICTIM), bytes(1001)), VICTIM),
    "truncated": (lambda s, u: s.put(BUCKET, name_of(u, VICTIM), FILES[VICTIM][:-1]), VICTIM),
    "emptied": (lambda s, u: s.put(BUCKET, name_of(u, VICTIM), b""), VICTIM),
    "extra": (lambda s, u: s.put(BUCKET, name_of(u, "extra"), b"x"), "extra"),
    "extra, empty": (lambda s, u: s.put(BUCKET, name_of(u, "zzz/extra"), b""), "zzz/extra"),
    # Without a list of names nobody can say which; that it is one of five, the receipt says.
    "missing": (lambda s, u: s.delete(BUCKET, name_of(u, VICTIM)), "4 files .* expected 5"),
    "all missing": (
        lambda s, u: [s.delete(BUCKET, name_of(u, name)) for name in FILES],
        "found no objects",
    ),
    "a directory in a file's place": (
        lambda s, u: s.put(BUCKET, name_of(u, VICTIM + "/x"), b""),
        VICTIM,
    ),
    "a file in a directory's place": (
        lambda s, u: s.put(BUCKET, name_of(u, "part-1"), b""),
        "part-1",
    ),
}


@pytest.mark.parametrize("tampering", TAMPERINGS)
def test_tampered_objects_are_an_integrity_error(
    server: StorageServer, tmp_path: Path, uploaded: str, tampering: str
) -> None:
    tamper, named = TAMPERINGS[tampering]
    tamper(server, uploaded)
    with pytest.raises(IntegrityError, match=named):
        do_materialize(server.url, uploaded, str(tmp_path / "back"))
    assert left(tmp_path) == set()


UNSAFE_NAMES = [
    "../escaped",
    "a/../../escaped",
    "a/..",
    ".",
    "./a",
    "/etc/escaped",
    "//escaped",
    "a//b",
    "C:/escaped",
    "c:\\escaped",
    "a\0b",
    "folder/",
    "",
]


@pytest.mark.parametrize("name", UNSAFE_NAMES)
def test_names_that_lead_out_are_refused(
    server: StorageServer, tmp_path: Path, uploaded: str, name: str
) -> None:
    server.put(BUCKET, name_of(uploaded, name), b"escaped")
    with pytest.raises(KerasRemoteError, match="unsafe"):
        do_materialize(server.url, uploaded, str(tmp_path / "sub" / "back"))
    assert left(tmp_path) <= {"sub"}
    assert not list((tmp_path / "sub").iterdir())


@pytest.mark.parametrize("name", ["back", partial_name("back")])
def test_a_link_at_the_destination_is_refused(
    server: StorageServer, tmp_path: Path, uploaded: str, name: str
) -> None:
    elsewhere = tmp_path / "elsewhere"
    make_tree(elsewhere, {"mine": b"mine"})
    (tmp_path / name).symlink_to(elsewhere)
    with pytest.raises(InvalidInputError, match=name):
        do_materialize(server.url, uploaded, str(tmp_path / "back"))
    assert read_tree(elsewhere) == {"mine": b"mine"}


def test_a_destination_that_holds_something_else_is_left_alone(
    server: StorageServer, tmp_path: Path, uploaded: str
) -> None:
    dest = make_tree(tmp_path / "back", {"mine": b"mine"})
    with pytest.raises(InvalidInputError, match="Nothing was overwritten"):
        do_materialize(server.url, uploaded, dest)
    assert read_tree(dest) == {"mine": b"mine"}
    assert left(tmp_path) == {"back"}


def test_what_is_there_already_is_verified(
    server: StorageServer, tmp_path: Path, uploaded: str
) -> None:
    dest = do_materialize(server.url, uploaded, str(tmp_path / "back"))
    server.clear_requests()
    assert do_materialize(server.url, uploaded, dest) == dest
    assert server.requests == []
    (tmp_path / "back" / VICTIM).write_bytes(bytes(1001))
    with pytest.raises(InvalidInputError, match=VICTIM):
        do_materialize(server.url, uploaded, dest)


@pytest.mark.parametrize("round_", range(3))
@pytest.mark.slow
def test_many_processes_materialize_to_one_place(
    server: StorageServer, tmp_path: Path, uploaded: str, round_: int
) -> None:
    dest = str(tmp_path / "back")
    jobs = [Job(do_materialize, server.url, uploaded, dest) for _ in range(6)]
    with killed_at_exit(*jobs):
        assert [job.result() for job in jobs] == [dest] * 6
    assert read_tree(dest) == FILES
    assert left(tmp_path) == {"back"}


@pytest.mark.slow
def test_a_kill_half_way_leaves_nothing_and_is_swept_up(
    server: StorageServer, tmp_path: Path, uploaded: str
) -> None:
    dest, partial = tmp_path / "back", tmp_path / partial_name("back")
    server.add_fault(Fault(path=r"/big\?.*alt=media", action="stall", after_bytes=BIG // 2))
    job = Job(do_materialize, server.url, uploaded, str(dest), retry=PATIENT)
    with killed_at_exit(job):
        wait_until(lambda: all((partial / "data" / name).exists() for name in ("big", VICTIM)))
        assert stat.S_IMODE(partial.stat().st_mode) == 0o700
    assert not dest.exists()
    assert left(tmp_path) == {partial.name}
    do_materialize(server.url, uploaded, str(dest))
    assert read_tree(dest) == FILES
    assert left(tmp_path) == {"back"}


def with_small_files_only(url: str, uri: str, dest: str) -> str:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    return do_materialize(url, uri, dest)


def test_a_disk_that_takes_no_more_leaves_nothing(
    server: StorageServer, tmp_path: Path, uploaded: str
) -> None:
    job = Job(with_small_files_only, server.url, uploaded, str(tmp_path / "back"))
    with killed_at_exit(job), pytest.raises(OSError, match="File too large"):
        job.result()
    assert left(tmp_path) == set()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A mounted file system of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if os.getuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_leaves_nothing(server: StorageServer, small_disk: Path, uploaded: str) -> None:
    with pytest.raises(OSError, match="No space left"):
        do_materialize(server.url, uploaded, str(small_disk / "back"))
    assert list(small_disk.iterdir()) == []


def test_a_mount_point_is_refused_before_anything_is_downloaded(
    server: StorageServer, small_disk: Path, tmp_path: Path, uploaded: str
) -> None:
    with pytest.raises(InvalidInputError, match="mount point"):
        do_materialize(server.url, uploaded, str(small_disk))
    assert not [r for r in server.requests if r.query.get("alt") == "media" and r.status == 200]
    assert left(tmp_path) == {"disk"}


def test_an_object_replaced_while_it_is_read_is_not_mixed(
    server: StorageServer, tmp_path: Path, uploaded: str
) -> None:
    server.add_fault(Fault(path=r"/big\?.*alt=media", action="truncate", after_bytes=3 << 20))
    server.add_fault(Fault(path=r"/big\?.*alt=media", nth=2, status=503, times=3))
    job = Job(do_materialize, server.url, uploaded, str(tmp_path / "back"))
    with killed_at_exit(job):
        wait_until(lambda: any(r.status == 503 for r in server.requests))
        server.put(BUCKET, name_of(uploaded, "big"), bytes(BIG))
        with pytest.raises(IntegrityError, match="big"):
            job.result()
    assert left(tmp_path) == set()


def test_a_broken_download_goes_on_where_it_broke(
    server: StorageServer, tmp_path: Path, uploaded: str
) -> None:
    server.clear_requests()
    server.add_fault(Fault(path=r"/big\?.*alt=media", action="truncate", after_bytes=5 << 20))
    dest = do_materialize(server.url, uploaded, str(tmp_path / "back"), retry=FAST)
    assert read_tree(dest) == FILES
    assert [r.status for r in server.requests if r.object_name and "/big" in r.object_name] == [
        200,
        206,
    ]
