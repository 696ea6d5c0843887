"""One contract for every `ObjectStore`: Cloud Storage's over HTTP, and the double in memory."""

import asyncio
import base64
import gzip
import hashlib
import http.server
import itertools
import json
import os
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import google_crc32c
import pytest

from keras_remote_airflow.core.cloud.bucket import open_bucket
from keras_remote_airflow.core.cloud.gcs import DIGEST_KEY, GcsStore
from keras_remote_airflow.core.cloud.policy import RetryPolicy
from keras_remote_airflow.core.cloud.store import (
    FileToSend,
    ObjectInfo,
    ObjectStore,
    ObjectToFetch,
    how_to_remove,
    list_objects,
)
from keras_remote_airflow.core.errors import (
    ConflictError,
    DataChangedError,
    IntegrityError,
    StoreError,
)
from keras_remote_airflow.testing import Fault

from .memory_store import MemoryStore

# Names that some layer between us and the object could mistake for something else.
NAMES = [
    "plain.csv",
    "with space.csv",
    "a/b/c",
    "per%20cent",
    "per%2Fcent",
    "plus+and&amp",
    "question?mark",
    "hash#sign",
    "semi;colon=equals",
    "quote'and\"double",
    "back\\slash",
    "tab\there",
    "e\u0301 (decomposed)",
    "\u00e9 (composed)",
    "日本語",
    "😀",
    "a/../b",
    "-leading-dash",
    "~tilde",
    "x" * 1000,
]


@dataclass(frozen=True)
class Subject:
    """A store under test, and what others do to its bucket behind its back."""

    store: ObjectStore
    delete: Callable[[str], object]
    replace: Callable[[str, bytes], object]


@pytest.fixture(params=["cloud_storage", "memory"])
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    if request.param == "memory":
        double = MemoryStore()
        yield Subject(double, double.delete, double.replace)
        return
    bucket = request.getfixturevalue("bucket")
    quick = RetryPolicy(initial=0.001)
    with open_bucket(bucket.name, retry=quick) as store:
        yield Subject(
            store,
            lambda name: bucket.blob(name).delete(),
            lambda name, content: bucket.blob(name).upload_from_string(content),
        )


@pytest.fixture
def store(subject: Subject) -> ObjectStore:
    return subject.store


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str, bytes], FileToSend]:
    """`file(name, content) -> Upload` of a new local file that holds the content."""

    def make(name: str, content: bytes) -> FileToSend:
        path = tmp_path / hashlib.sha256(name.encode()).hexdigest()
        path.write_bytes(content)
        return FileToSend(
            str(path),
            name,
            len(content),
            path.stat().st_mtime_ns,
            google_crc32c.value(content),
            hashlib.sha256(name.encode()).digest(),
        )

    return make


def send(store: ObjectStore, *uploads: FileToSend) -> dict[str, bool]:
    """Upload, and return which names were sent."""
    sent: dict[str, bool] = {}
    store.upload(iter(uploads), lambda upload, was_sent: sent.update({upload.name: was_sent}))
    return sent


def only(store: ObjectStore, name: str) -> ObjectInfo:
    [info] = [info for info in list_objects(store, name) if info.name == name]
    return info


def test_absent_object_reads_as_none(store):
    assert store.read("absent") is None


def test_created_object_reads_back(store):
    assert store.create("name", b"content") is True
    assert store.read("name") == b"content"


def test_empty_object_is_not_an_absent_one(store):
    assert store.create("name", b"") is True
    assert store.read("name") == b""


def test_taken_name_is_never_overwritten(store):
    store.create("name", b"first")
    assert store.create("name", b"second") is False
    assert store.read("name") == b"first"


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_any_name_survives_the_way_there_and_back(store, file, tmp_path, name):
    assert store.create(name, b"small") is True
    assert store.read(name) == b"small"
    assert send(store, file(name + ".up", b"sent")) == {name + ".up": True}
    infos = list(list_objects(store, name))
    assert [info.name for info in infos] == [name, name + ".up"]
    store.download([ObjectToFetch(infos[1], str(tmp_path / "back"))], lambda _: None)
    assert (tmp_path / "back").read_bytes() == b"sent"


def test_listing_is_in_the_byte_order_of_the_names(store):
    names = ["b", "a", "B", "a/z", "a.txt", "é", "a-1", "\uffee", "😀", "a/b/c"]
    for name in names:
        store.create(name, b"")
    assert [info.name for info in list_objects(store, "")] == sorted(names, key=str.encode)


def test_listing_shows_only_what_begins_with_the_prefix(store):
    for name in ("a/1", "a/2", "ab", "b", "a"):
        store.create(name, b"")
    assert [info.name for info in list_objects(store, "a/")] == ["a/1", "a/2"]
    assert list(list_objects(store, "absent/")) == []


def test_listing_tells_size_crc32c_generation_and_digest(store, file):
    store.create("made", b"123456789")
    upload = file("sent", b"123456789")
    send(store, upload)
    made, sent = only(store, "made"), only(store, "sent")
    assert (made.size, made.crc32c, made.digest) == (9, 0xE3069283, None)
    assert (sent.size, sent.crc32c, sent.digest) == (9, 0xE3069283, upload.digest.hex())
    assert made.generation != sent.generation


def test_more_than_a_page_is_listed_in_order_and_once(store, file):
    names = [f"{number:04}" for number in range(1005)]
    send(store, *(file(name, b"") for name in names))
    first = store.list_page("")
    assert len(first.objects) == 1000
    assert first.next_token
    assert [info.name for info in list_objects(store, "")] == names


@pytest.mark.parametrize(
    "size", [0, 1, 1 << 20, (1 << 20) + 1, 3 << 20, 8 << 20, (8 << 20) + 1, (9 << 20) + 17]
)
def test_file_of_any_size_arrives_whole_and_comes_back_whole(store, file, tmp_path, size):
    content = os.urandom(size)
    upload = file("big", content)
    assert send(store, upload) == {"big": True}
    info = only(store, "big")
    assert (info.size, info.crc32c, info.digest) == (size, upload.crc32c, upload.digest.hex())
    store.download([ObjectToFetch(info, str(tmp_path / "back"))], lambda _: None)
    assert (tmp_path / "back").read_bytes() == content


def test_each_upload_and_download_is_reported_once(store, file, tmp_path):
    names = [f"{number:03}" for number in range(300)]
    reported: list[str] = []
    store.upload((file(n, n.encode()) for n in names), lambda u, _: reported.append(u.name))
    assert sorted(reported) == names
    reported.clear()
    infos = list(list_objects(store, ""))
    store.download(
        (ObjectToFetch(info, str(tmp_path / f"back-{info.name}")) for info in infos),
        lambda done: reported.append(done.info.name),
    )
    assert sorted(reported) == names
    assert all((tmp_path / f"back-{name}").read_bytes() == name.encode() for name in names)


def test_nothing_to_do_is_fine(store):
    store.upload(iter(()), lambda *_: pytest.fail("nothing was sent"))
    store.download(iter(()), lambda _: pytest.fail("nothing was fetched"))


@pytest.mark.parametrize("size", [10, 9 << 20], ids=["small", "large"])
def test_object_that_holds_the_same_bytes_is_left_alone(store, file, size):
    upload = file("name", b"x" * size)
    send(store, upload)
    before = only(store, "name")
    assert send(store, upload) == {"name": False}
    assert only(store, "name") == before


@pytest.mark.parametrize("size", [10, 9 << 20], ids=["small", "large"])
def test_object_that_holds_other_bytes_is_a_conflict_and_stays(store, file, size):
    store.create("name", b"y" * 10)
    with pytest.raises(ConflictError, match="name"):
        send(store, file("name", b"x" * size))
    assert store.read("name") == b"y" * 10


def _append(path: str) -> None:
    with open(path, "ab") as file:
        file.write(b"more")


def _touch(path: str) -> None:
    with open(path, "r+b") as file:
        file.write(b"CHANGED")


def _change_behind_the_clock(path: str) -> None:
    before = os.stat(path)
    _touch(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


CHANGES = [_append, _touch, _change_behind_the_clock, os.unlink, lambda path: os.truncate(path, 5)]


@pytest.mark.parametrize("change", CHANGES, ids=["longer", "other", "sly", "gone", "shorter"])
@pytest.mark.parametrize("size", [100, 2 << 20, 9 << 20], ids=["small", "medium", "large"])
def test_file_that_changed_since_it_was_hashed_is_not_stored(store, file, size, change):
    upload = file("name", b"x" * size)
    change(upload.path)
    with pytest.raises(DataChangedError) as caught:
        send(store, upload)
    assert upload.path in str(caught.value)
    assert store.read("name") is None


def test_object_gone_since_it_was_listed_is_an_integrity_error(subject, tmp_path):
    subject.store.create("name", b"content")
    info = only(subject.store, "name")
    subject.delete("name")
    with pytest.raises(IntegrityError, match="name"):
        subject.store.download([ObjectToFetch(info, str(tmp_path / "back"))], lambda _: None)


def test_object_replaced_since_it_was_listed_is_an_integrity_error(subject, tmp_path):
    subject.store.create("name", b"content")
    info = only(subject.store, "name")
    subject.replace("name", b"CONTENT")
    with pytest.raises(IntegrityError, match="name"):
        subject.store.download([ObjectToFetch(info, str(tmp_path / "back"))], lambda _: None)


@pytest.mark.slow
def test_bytes_that_disagree_with_the_checksum_are_an_integrity_error(store, tmp_path):
    store.create("name", b"content")
    info = only(store, "name")._replace(crc32c=1)
    with pytest.raises(IntegrityError, match="name"):
        store.download([ObjectToFetch(info, str(tmp_path / "back"))], lambda _: None)


def test_download_does_not_overwrite_a_file(store, tmp_path):
    store.create("name", b"content")
    (tmp_path / "back").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        store.download([ObjectToFetch(only(store, "name"), str(tmp_path / "back"))], lambda _: None)
    assert (tmp_path / "back").read_bytes() == b"mine"


# Cloud Storage only.


def test_bytes_on_the_move_are_told_and_none_of_them_twice(gcs_server, bucket, file, tmp_path):
    size = 9 << 20
    gcs_server.add_fault(Fault(method="PUT", action="drop_before", after_bytes=5 << 20))
    gcs_server.add_fault(Fault(path="alt=media", action="truncate", after_bytes=5 << 20))
    done_at: list[int] = []
    moved: list[int] = []
    with open_bucket(bucket.name, retry=RetryPolicy(initial=0.001)) as store:
        uploads = [file("large", os.urandom(size)), file("small", b"x" * (1 << 20))]
        store.upload(uploads, lambda *_: done_at.append(sum(moved)), moved.append)
        up, moved[:] = moved[:], []
        downloads = [ObjectToFetch(i, str(tmp_path / i.name)) for i in list_objects(store, "")]
        store.download(downloads, lambda _: done_at.append(sum(moved)), moved.append)
    for steps in (up, moved):
        reached = list(itertools.accumulate(steps))
        assert len(reached) > 8
        assert 8 << 20 <= max(reached) <= size
        assert reached[-1] == 0
    assert done_at.count(0) >= 2, "a large file is taken back just before it is done"


def test_missing_bucket_is_an_error_of_its_own(gcs_bucket, tmp_path, file):
    with open_bucket("no-such-bucket-here") as store:
        for attempt in (
            lambda: store.read("name"),
            lambda: store.list_page("name"),
            lambda: store.create("name", b""),
            lambda: send(store, file("name", b"x")),
        ):
            with pytest.raises(StoreError, match="no-such-bucket-here") as caught:
                attempt()
            assert (caught.value.status, caught.value.transient) == (404, False)


def test_uploaded_object_carries_digest_checksum_and_content_type(bucket, file):
    upload = file("train.csv", b"a,b\n1,2\n")
    with open_bucket(bucket.name) as store:
        send(store, upload)
    blob = bucket.get_blob("train.csv")
    assert blob.metadata == {DIGEST_KEY: upload.digest.hex()}
    assert blob.crc32c == base64.b64encode(upload.crc32c.to_bytes(4, "big")).decode()
    assert blob.content_type == "text/csv"


def test_every_write_is_create_only_and_declares_its_checksum(gcs_server, gcs_bucket, file):
    with open_bucket(gcs_bucket) as store:
        store.create("marker", b"{}")
        send(store, file("small", b"x"), file("large", b"x" * (9 << 20)))
    posts = [request for request in gcs_server.requests if request.method == "POST"]
    assert {request.query["ifGenerationMatch"] for request in posts} == {"0"}
    assert {request.object_name for request in posts} == {"marker", "small", "large"}


def test_work_that_waits_for_its_own_store_is_an_error_and_no_deadlock(bucket, tmp_path):
    with open_bucket(bucket.name) as store:
        store.create("name", b"content")
        downloads = (
            ObjectToFetch(info, str(tmp_path / "back")) for info in list_objects(store, "")
        )
        with pytest.raises(RuntimeError, match="its own store"):
            store.download(downloads, lambda _: None)


def test_store_lets_go_of_its_thread(gcs_bucket):
    import threading

    before = set(threading.enumerate())
    with open_bucket(gcs_bucket) as store:
        store.read("name")
        assert set(threading.enumerate()) > before
    assert set(threading.enumerate()) == before


@pytest.mark.parametrize("status", [200, 404])
@pytest.mark.parametrize("body", [b"<html>Please log in</html>", b"[" * 10_000], ids=["page", "["])
def test_answer_that_is_not_cloud_storages_is_an_error_that_says_so(monkeypatch, body, status):
    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Page) as portal:
        threading.Thread(target=portal.serve_forever, args=[0.01], daemon=True).start()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{portal.server_port}")
        with open_bucket("bucket", retry=RetryPolicy(deadline=0)) as store:
            with pytest.raises(StoreError) as raised:
                store.list_page("x")
            assert ("Cloud Storage" if status == 200 else "HTTP 404") in str(raised.value)
            if status == 404 and not body.startswith(b"<"):
                assert store.read("marker") is None
            else:
                with pytest.raises(StoreError, match="not a Cloud Storage answer") as raised:
                    store.read("marker")
                assert raised.value.transient == (status == 200)
                assert status == 200 or "<html>" not in str(raised.value)
        portal.shutdown()


def test_a_server_that_is_not_there_is_named_in_plain_words(monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")
    with (
        open_bucket("bucket", retry=RetryPolicy(deadline=0)) as store,
        pytest.raises(StoreError, match=r"127\.0\.0\.1:1") as raised,
    ):
        store.list_page("x")
    assert "ssl" not in str(raised.value)


def test_answer_that_would_fill_the_memory_is_refused(monkeypatch):
    class Bomb(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            body = gzip.compress(bytes(80 << 20), 1)
            self.send_response(200)
            self.send_header("Content-Encoding", "gzip")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Bomb) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
        with (
            open_bucket("bucket") as store,
            pytest.raises(StoreError, match="Cloud Storage") as raised,
        ):
            store.list_page("x")
        assert not raised.value.transient
        server.shutdown()


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([{}], []),
        ([{"items": None, "nextPageToken": ""}], []),
        # "There may be more": Cloud Storage is free to send a page without objects and a token.
        ([{"nextPageToken": "A"}, {"nextPageToken": "B"}, {"items": [{"name": "x"}]}], ["x"]),
        ([{"items": [], "nextPageToken": "again"}], "leads to itself"),
        ([{"items": [{"name": "x/b"}, {"name": "x/a"}]}], "x/a after x/b"),
        ([{"items": [{"name": "x"}], "nextPageToken": t} for t in "AB"], "x after x"),
        ([{"items": [{"size": "1"}]}], "incomplete"),
        ([{"items": [{"name": "x", "crc32c": "?"}]}], "incomplete"),
        ([{"items": [{"name": 5}]}], "incomplete"),
        ([{"items": [{"name": "x\ud800"}]}], "incomplete"),
        ([{"items": [{"name": "x", "size": float("inf")}]}], "incomplete"),
        ([[]], "not a Cloud Storage answer"),
    ],
    ids=[
        "empty",
        "null",
        "empty pages",
        "one token",
        "disorder",
        "two tokens",
        "no name",
        "no CRC32C",
        "a number",
        "no text",
        "infinite",
        "list",
    ],
)
def test_listing_ends_whatever_the_server_answers(monkeypatch, answers, expected):
    class Lists(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if "fields=size" in self.path:  # an object whose size was not listed
                body = json.dumps({"size": "1", "crc32c": "AAAAAA=="}).encode()
            else:
                answers.append(answers.pop(0))
                body = json.dumps(answers[-1]).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Lists) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_port}")
        with open_bucket("bucket") as store:
            if isinstance(expected, list):
                assert [info.name for info in list_objects(store, "x")] == expected
                assert [info.name for info in store.list_page("x").objects] == expected
            else:
                with pytest.raises(StoreError, match=expected) as raised:
                    list(list_objects(store, "x"))
                assert not raised.value.transient
        server.shutdown()


def test_listing_of_empty_pages_ends_too():
    class Endless:
        """A transport whose every answer is an empty page that leads to the next."""

        asked = 0
        retry = SimpleNamespace(run=lambda what, attempt: attempt())

        async def exchange(self, *_: object, **__: object) -> tuple[int, dict[str, str], bytes]:
            self.asked += 1
            return 200, {}, b'{"nextPageToken": "%d"}' % self.asked

    endless: Any = Endless()
    store = GcsStore("bucket", endless)
    with pytest.raises(StoreError, match="empty pages"):
        asyncio.run(store.alist_page("x"))


def test_transfer_that_a_library_cancels_is_no_success(gcs_bucket, file):
    def done(sent: FileToSend, _: bool) -> None:
        if sent.name == "3":
            raise asyncio.CancelledError

    with (
        open_bucket(gcs_bucket) as store,
        pytest.raises(StoreError, match="library") as raised,
    ):
        store.upload([file(str(number), b"x") for number in range(8)], done)
    assert raised.value.transient


@pytest.mark.parametrize("endpoint", ["127.0.0.1:9", "ftp://127.0.0.1:9"])
def test_endpoint_that_is_no_http_url_fails_at_once(monkeypatch, endpoint):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", endpoint)
    with open_bucket("bucket") as store, pytest.raises(StoreError, match=f"endpoint {endpoint}"):
        store.list_page("x")


def test_proxy_without_a_scheme_is_an_http_proxy(gcs_server, monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://storage.invalid")
    monkeypatch.setenv("http_proxy", gcs_server.url.removeprefix("http://"))
    # Whatever a server that is no proxy makes of the request: it was asked.
    with open_bucket("test-bucket") as store, suppress(StoreError):
        store.list_page("x")
    assert gcs_server.requests


def test_proxy_that_cannot_be_used_is_named(monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://storage.invalid")
    monkeypatch.setenv("http_proxy", "socks5://127.0.0.1:9")
    with pytest.raises(StoreError, match="socks5 proxy"), open_bucket("bucket"):
        pass


def test_store_from_before_a_fork_says_so_instead_of_waiting(gcs_bucket):
    with open_bucket(gcs_bucket) as store:
        child = os.fork()
        if not child:
            try:
                store.read("x")
            except RuntimeError:
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_suggested_command_cannot_be_misread_by_a_shell():
    name = "gs://b/x'; touch pwned #"
    assert shlex.split(how_to_remove(name).split(": ", 1)[1]) == ["gcloud", "storage", "rm", name]
    assert "gcloud" not in how_to_remove("gs://b/*")


def test_files_that_keep_us_waiting_are_read_many_at_once(gcs_bucket, file, monkeypatch):
    lock, most, now, system_open = threading.Lock(), 0, 0, os.open

    def slow_open(path, flags, *arguments, **options):
        nonlocal most, now
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.005)
        with lock:
            now -= 1
        return system_open(path, flags, *arguments, **options)

    uploads = [file(f"name-{number}", b"x" * number) for number in range(200)]
    monkeypatch.setattr("keras_remote_airflow.core.cloud.transfer.os.open", slow_open)
    with open_bucket(gcs_bucket) as store:
        assert send(store, *uploads) == {upload.name: True for upload in uploads}
    assert most > 8
