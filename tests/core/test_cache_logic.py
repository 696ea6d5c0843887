"""The order of things in the cache, on the double: marker last, resume, conflicts, pages."""

import asyncio
import logging
from itertools import islice

import pytest

from keras_remote_airflow.core.cloud.store import Page, ignore_moved
from keras_remote_airflow.core.datasets.lookup import CacheEntry, look, lookup
from keras_remote_airflow.core.datasets.upload import publish
from keras_remote_airflow.core.disk.hashing import take_snapshot
from keras_remote_airflow.core.disk.snapshot import Snapshot
from keras_remote_airflow.core.errors import ConflictError, MarkerError, StoreError
from keras_remote_airflow.core.layout import KERAS_REMOTE, KINETIC, CacheKey
from keras_remote_airflow.core.progress import Progress

from .memory_store import MemoryStore

FILES = {f"{number:02}": f"content {number}" for number in range(12)}


@pytest.fixture
def snapshot(tree):
    return take_snapshot(str(tree(FILES)))


@pytest.fixture(params=[KERAS_REMOTE, KINETIC], ids=lambda layout: layout.name)
def key(request, snapshot):
    return CacheKey("memory-bucket", "default", snapshot.content_hash, request.param)


def put(store: MemoryStore, key: CacheKey, snapshot: Snapshot) -> Progress:
    """Publish, and return what was sent."""
    sent = Progress(logging.getLogger(__name__), "Uploading")
    publish(store, key, snapshot, sent, "no marker")
    return sent


def found(store: MemoryStore, key: CacheKey, verify: str = "page") -> CacheEntry | None:
    """Look by the hash alone."""
    return asyncio.run(look(store, key, verify))


def whole(
    store: MemoryStore, key: CacheKey, snapshot: Snapshot, verify: str = "page"
) -> CacheEntry | None:
    """Look with the data at hand."""
    entry = lookup(store, key, snapshot, verify)
    return entry if isinstance(entry, CacheEntry) else None


LOOKS = [whole, lambda store, key, snapshot, verify="page": found(store, key, verify)]


class DyingStore(MemoryStore):
    """Takes a few files and then fails, like a worker that is killed."""

    def __init__(self, lives: int) -> None:
        super().__init__()
        self.lives = lives

    def upload(self, files, done, moved=ignore_moved):
        def mortal(upload, was_sent):
            done(upload, was_sent)
            self.lives -= 1
            if self.lives == 0:
                raise KeyboardInterrupt

        super().upload(files, mortal, moved)


def test_marker_is_written_after_every_object(snapshot, key):
    store = MemoryStore()
    put(store, key, snapshot)
    *files, last = store.written  # the files in an order that differs between uploaders
    assert sorted(files) == sorted(map(key.object_name, FILES))
    assert last == key.marker_name


def test_what_was_published_is_found_by_its_data_and_by_its_hash(snapshot, key):
    store = MemoryStore()
    put(store, key, snapshot)
    entry = CacheEntry(key.gcs_uri, True, 12, snapshot.total_bytes)
    assert whole(store, key, snapshot) == entry
    assert found(store, key) == entry


def test_objects_without_a_marker_are_no_entry(snapshot, key):
    store = DyingStore(lives=12)
    with pytest.raises(KeyboardInterrupt):
        put(store, key, snapshot)
    assert len(store.written) == 12
    assert whole(store, key, snapshot) is None
    assert found(store, key) is None


def test_next_attempt_sends_only_what_a_dead_one_left_out(snapshot, key):
    store = DyingStore(lives=5)
    with pytest.raises(KeyboardInterrupt):
        put(store, key, snapshot)
    assert key.marker_name not in store.written
    left_out = set(map(key.object_name, FILES)) - set(store.written)
    store.written.clear()
    sent = put(store, key, snapshot)
    assert set(store.written) == left_out | {key.marker_name}
    assert sent.files == len(store.written) - 1 == 7


def test_object_with_other_bytes_is_a_conflict_and_nothing_is_written(snapshot, key):
    store = MemoryStore()
    store.replace(key.object_name("03"), b"Content 3")
    store.written.clear()
    with pytest.raises(ConflictError, match=key.object_name("03")) as caught:
        put(store, key, snapshot)
    assert snapshot.local_path("03") in str(caught.value)
    assert store.written == []


@pytest.mark.parametrize("name", ["00a", "zz", "sub/x", "03/x", "sub/", ""])
def test_object_that_is_not_in_the_data_is_a_conflict(snapshot, key, name):
    store = MemoryStore()
    store.replace(key.object_name(name), b"?")
    store.written.clear()
    with pytest.raises(ConflictError, match=key.object_name(name)):
        put(store, key, snapshot)
    assert store.written == []


def test_folder_objects_of_other_tools_are_no_conflict(snapshot, key):
    store = MemoryStore()
    for name in ("", "sub/", "sub/deeper/"):
        store.replace(key.object_name(name), b"")
    put(store, key, snapshot)
    assert whole(store, key, snapshot, "full")
    assert found(store, key, "full")


def test_other_layouts_marker_is_no_conflict(snapshot):
    store = MemoryStore()
    ours = CacheKey("memory-bucket", "default", snapshot.content_hash)
    theirs = CacheKey("memory-bucket", "default", snapshot.content_hash, KINETIC)
    put(store, ours, snapshot)
    assert whole(store, theirs, snapshot) is None
    assert put(store, theirs, snapshot).files == 0
    for key in (ours, theirs):
        assert whole(store, key, snapshot, "full")
        assert found(store, key, "full")


def test_marker_of_a_faster_uploader_is_accepted(snapshot, key):
    store = MemoryStore()
    put(store, key, snapshot)
    store.written.clear()
    assert put(store, key, snapshot).files == 0
    assert store.written == []


class OvertakenStore(MemoryStore):
    """Has all of the data as soon as the first files are sent: another uploader was faster."""

    def __init__(self, key: CacheKey, snapshot: Snapshot) -> None:
        super().__init__()
        self.tried = 0
        self._key, self._snapshot = key, snapshot

    def upload(self, files, done, moved=ignore_moved):
        for number in range(len(self._snapshot) if not self.tried else 0):
            file = self._snapshot.record(number)
            with open(self._snapshot.local_path(file.path), "rb") as local:
                self.replace(self._key.object_name(file.path), local.read(), file.digest.hex())
        files = list(files)
        self.tried += len(files)
        super().upload(files, done, moved)


def test_what_a_faster_uploader_stores_meanwhile_is_listed_and_not_tried_file_by_file(tree):
    snapshot = take_snapshot(str(tree({f"{number:03}": str(number) for number in range(300)})))
    key = CacheKey("memory-bucket", "default", snapshot.content_hash)
    store = OvertakenStore(key, snapshot)
    assert put(store, key, snapshot).files == 0
    assert store.tried + store.calls.count("list_page") < 30
    assert whole(store, key, snapshot, "full")


def test_garbage_in_the_markers_place_is_no_success(snapshot, key):
    store = MemoryStore()
    store.replace(key.marker_name, b"garbage")
    with pytest.raises(MarkerError):
        whole(store, key, snapshot)
    with pytest.raises(MarkerError):
        put(store, key, snapshot)


class LosingStore(MemoryStore):
    """Leaves one file out of those that it is given: it says nothing of it, or never takes it."""

    def __init__(self, lost: str) -> None:
        super().__init__()
        self.lost = lost

    def upload(self, files, done, moved=ignore_moved):
        given = list(files if self.lost == "unsaid" else islice(files, len(FILES) - 1))
        super().upload(given[-len(FILES) + 1 :], done, moved)


@pytest.mark.parametrize("lost", ["unsaid", "untaken"])
def test_marker_is_not_written_while_a_file_is_unaccounted_for(snapshot, key, lost):
    store = LosingStore(lost)
    with pytest.raises(StoreError, match=r"1 file .*data-cache") as raised:
        put(store, key, snapshot)
    assert raised.value.transient
    assert key.marker_name not in store.written


class ContradictingStore(MemoryStore):
    """Says that the marker is there and then that it is not; or takes files and lists none."""

    def create(self, name, content):
        self.calls.append("create")
        return False

    def list_page(self, prefix, token=None):
        super().list_page(prefix, token)
        return Page([], None)

    def upload(self, files, done, moved=ignore_moved):
        super().upload(files, lambda file, _: done(file, not self.lists), moved)

    lists = False


@pytest.mark.timeout(20)
@pytest.mark.parametrize("lists", [False, True])
def test_server_that_contradicts_itself_is_an_error_and_no_endless_loop(tree, lists):
    snapshot = take_snapshot(str(tree({f"{number}": "" for number in range(40)})))
    key = CacheKey("memory-bucket", "default", snapshot.content_hash, KERAS_REMOTE)
    store = ContradictingStore()
    store.lists = lists
    with pytest.raises(StoreError, match=key.content_hash) as raised:
        put(store, key, snapshot)
    assert raised.value.transient
    assert store.calls.count("list_page" if lists else "create") > 1


def test_lookup_reads_the_marker_and_one_page(snapshot, key):
    store = MemoryStore(page_size=4)
    put(store, key, snapshot)
    for looked in LOOKS:
        store.calls.clear()
        assert looked(store, key, snapshot)
        assert store.calls == ["read", "list_page"]


def test_full_lookup_reads_all_pages_and_sees_what_the_first_does_not_show(snapshot, key, caplog):
    store = MemoryStore(page_size=4)
    put(store, key, snapshot)
    store.delete(key.object_name("11"))
    for looked in LOOKS:
        assert looked(store, key, snapshot)
        caplog.clear()
        assert looked(store, key, snapshot, "full") is None
        assert key.gcs_uri in caplog.text


def test_absent_marker_costs_one_read(snapshot, key):
    store = MemoryStore()
    assert whole(store, key, snapshot) is None
    assert store.calls == ["read"]
