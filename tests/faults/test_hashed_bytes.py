"""Guarantee 1: only bytes that were hashed are published, whatever happens to the files meanwhile.

Each change happens at a known moment: the server answers a request with 503 until it has been
made. Changes of one file, by the way it is sent:
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from faultkit import (
    BUCKET,
    Tap,
    content,
    do_upload,
    make_tree,
    published,
    small_files,
    wait_until,
)

from keras_remote_airflow.core.datasets.upload import UploadResult
from keras_remote_airflow.core.errors import DataChangedError
from keras_remote_airflow.testing import Fault, StorageServer

SIZES = {"small": 5000, "streamed": 3 << 20, "session": 9 << 20}


def rewrite(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def touch(path: Path) -> None:
    os.utime(path)


def replace(path: Path) -> None:
    other = path.with_name(path.name + ".new")
    other.write_bytes(bytes(path.stat().st_size))
    other.rename(path)


def delete(path: Path) -> None:
    path.unlink()


def make_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def make_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def link_elsewhere(path: Path) -> None:
    other = path.parent.parent / "elsewhere"
    other.write_bytes(bytes(path.stat().st_size))
    path.unlink()
    path.symlink_to(other)


def flip_a_bit(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


def keeping_mtime(change: Callable[[Path], None]) -> Callable[[Path], None]:
    def changed(path: Path) -> None:
        before = path.stat()
        change(path)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))

    return changed


CHANGES = {
    "rewrite": rewrite,
    "append": append,
    "truncate": truncate,
    "touch": touch,
    "replace": replace,
    "delete": delete,
    "make_directory": make_directory,
    "make_fifo": make_fifo,
    "link_elsewhere": link_elsewhere,
    "flip_a_bit": flip_a_bit,
    "rewrite_keeping_mtime": keeping_mtime(rewrite),
    "append_keeping_mtime": keeping_mtime(append),
    "truncate_keeping_mtime": keeping_mtime(truncate),
    "replace_keeping_mtime": keeping_mtime(replace),
    "flip_a_bit_keeping_mtime": keeping_mtime(flip_a_bit),
}


class Uploading(Thread):
    """An upload in the background, whose outcome `result` returns or raises."""

    def __init__(self, url: str, path: str) -> None:
        super().__init__()
        self._arguments = (url, path)
        self.outcome: Any = None

    def run(self) -> None:
        try:
            self.outcome = do_upload(*self._arguments)
        except Exception as exc:  # noqa: BLE001 - raised again by `result`
            self.outcome = exc

    def result(self) -> UploadResult:
        self.join(30)
        assert not self.is_alive()
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


@contextmanager
def held_at(server: StorageServer, data: str, **fault: Any) -> Iterator[Uploading]:
    """Start an upload of `data`; the block runs while the matching request is refused."""
    server.add_fault(Fault(**{"status": 503, "times": 0, **fault}))
    uploading = Uploading(server.url, data)
    uploading.start()
    wait_until(lambda: any(r.status in (503, None) for r in server.requests))
    yield uploading
    server.clear_faults()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_after_it_was_hashed(
    server: StorageServer, tmp_path: Path, change: str, size: str
) -> None:
    path = make_tree(tmp_path / "data", small_files(2) | {"file": content(SIZES[size])})
    with held_at(server, path, path=r"/o\?prefix") as uploading:
        CHANGES[change](tmp_path / "data" / "file")
    with pytest.raises(DataChangedError, match=r"changed .*data/file\. Nothing was published"):
        uploading.result()
    assert published(server) == {}
    assert not [name for name in server.objects(BUCKET) if name.endswith("/file")]


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_while_it_is_sent(
    server: StorageServer, tmp_path: Path, change: str
) -> None:
    path = make_tree(tmp_path / "data", {"file": content(SIZES["session"])})
    server.add_fault(Fault(method="PUT", action="drop_before", after_bytes=2 << 20))
    with held_at(server, path, method="PUT", nth=2) as uploading:
        CHANGES[change](tmp_path / "data" / "file")
        # An attempt that had opened the old file may have gone on with it; the one after it not.
        refused = len(server.requests)
        wait_until(lambda: len(server.requests) > refused + 1 or not uploading.is_alive())
    with pytest.raises(DataChangedError, match=r"changed .*data/file\. Nothing was published"):
        uploading.result()
    assert server.objects(BUCKET) == {}


def test_a_retry_after_a_change_publishes_the_new_bytes(
    server: StorageServer, tmp_path: Path
) -> None:
    path = make_tree(tmp_path / "data", small_files(2) | {"file": content(5000)})
    with held_at(server, path, path=r"/o\?prefix") as uploading:
        rewrite(tmp_path / "data" / "file")
    with pytest.raises(DataChangedError):
        uploading.result()
    result = do_upload(server.url, path)
    assert set(published(server)) == {result.content_hash}


def test_files_added_meanwhile_are_not_part_of_the_entry(
    server: StorageServer, tmp_path: Path
) -> None:
    files = small_files(3)
    path = make_tree(tmp_path / "data", files)
    with held_at(server, path, path=r"/o\?prefix") as uploading:
        make_tree(path, {"added": b"later", "part-0/added": b"later"})
    result = uploading.result()
    assert published(server) == {result.content_hash: set(files)}


def test_a_directory_that_vanishes(server: StorageServer, tmp_path: Path) -> None:
    path = make_tree(tmp_path / "data", small_files(3))
    with held_at(server, path, path=r"/o\?prefix") as uploading:
        shutil.rmtree(path)
    with pytest.raises(DataChangedError, match="it is gone"):
        uploading.result()
    assert server.objects(BUCKET) == {}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("call", ["open", "pread"])
def test_a_mount_that_dies_meanwhile_is_an_outage_and_no_change(
    server: StorageServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, size: str
) -> None:
    path = make_tree(tmp_path / "data", {"sub/file": content(SIZES[size])})
    real = getattr(os, call)

    def dead(*args: Any, **kwargs: Any) -> Any:
        if call == "pread" or str(args[0]) == f"{path}/sub/file":
            raise OSError(errno.ENOTCONN, "not connected", *args[: call == "open"])
        return real(*args, **kwargs)

    monkeypatch.setattr(os, call, dead)
    with pytest.raises(OSError, match=r"not connected: '.*/data/sub/file'") as raised:
        do_upload(server.url, path)
    assert raised.value.errno == errno.ENOTCONN
    assert server.objects(BUCKET) == {}


@pytest.mark.parametrize("size", SIZES)
def test_a_bit_that_flips_on_the_way_is_sent_again(
    server: StorageServer, tmp_path: Path, size: str
) -> None:
    path = make_tree(tmp_path / "data", {"file": content(SIZES[size])})
    with Tap(server.url, flip_at=SIZES[size] // 2 + 2000) as tap:
        result = do_upload(tap.url, path)
        assert tap.flipped == 1
    assert any(r.status == 400 for r in server.requests)
    assert published(server) == {result.content_hash: {"file"}}
