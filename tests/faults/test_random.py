"""Random trees, and random interleavings of uploaders, an evictor and a reader."""

import logging
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from faultkit import (
    BUCKET,
    FAST,
    client_for,
    do_materialize,
    do_upload,
    hashes_of,
    make_tree,
    prefix_of,
    read_tree,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from keras_remote_airflow.core.cloud.gcs import GcsStore
from keras_remote_airflow.core.cloud.policy import RetryPolicy
from keras_remote_airflow.core.cloud.transport import Answer, Transport
from keras_remote_airflow.core.datasets.lookup import find, lookup
from keras_remote_airflow.core.datasets.upload import publish
from keras_remote_airflow.core.disk.hashing import take_snapshot
from keras_remote_airflow.core.errors import DataChangedError, IntegrityError
from keras_remote_airflow.core.layout import CacheKey
from keras_remote_airflow.core.progress import Progress
from keras_remote_airflow.testing import StorageServer

pytestmark = pytest.mark.slow  # many journeys, some of them killed

_log = logging.getLogger(__name__)
_PART = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], exclude_characters="/\\:"),
    min_size=1,
    max_size=20,
).filter(lambda part: part not in (".", "..", ".cache_marker") and len(part.encode()) < 80)
_SIZES = st.one_of(
    st.just(0), st.integers(1, 5000), st.sampled_from([(1 << 20) - 1, (1 << 20) + 1])
)


@st.composite
def trees(draw: st.DrawFn) -> dict[str, bytes]:
    """Files by relative path; no file is a directory of another."""
    files: dict[str, bytes] = {}
    for parts in draw(st.lists(st.lists(_PART, min_size=1, max_size=5), max_size=12)):
        name = "/".join(parts)
        parents = {"/".join(parts[:n]) for n in range(1, len(parts))}
        if parents & files.keys() or any(other.startswith(name + "/") for other in files):
            continue
        seed = draw(st.binary(min_size=1, max_size=8))
        size = draw(_SIZES)
        files[name] = (seed * (size // len(seed) + 1))[:size]
    return files


@pytest.fixture(scope="module")
def shared_server() -> Any:
    with StorageServer([BUCKET]) as server:
        server.deny("overwrite", "delete", "update", "bucket_get")
        yield server


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(files=trees())
def test_what_is_read_back_is_what_was_there(
    shared_server: StorageServer, files: dict[str, bytes]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = make_tree(Path(folder) / "data", files)
        result = do_upload(shared_server.url, path)
        assert result.content_hash in hashes_of(files)
        dest = do_materialize(shared_server.url, result.gcs_uri, folder + "/back")
        assert read_tree(dest) == files
        assert do_upload(shared_server.url, path).cache_hit


class DiedError(Exception):
    """What ends a publication that is to die."""


class MortalTransport(Transport):
    """Makes so many requests, and dies of the next one."""

    def __init__(self, client: Any, policy: RetryPolicy, requests: int) -> None:
        super().__init__(client, policy)
        self._left = requests

    @asynccontextmanager
    async def request(self, *args: Any, **kwargs: Any) -> AsyncIterator[Answer]:
        self._left -= 1
        if self._left < 0:
            raise DiedError
        async with super().request(*args, **kwargs) as answer:
            yield answer


class Interleaving(RuleBasedStateMachine):
    """Two uploaders that can be stopped between their steps, one that evicts, one that reads.

    The data changes under the uploaders. The model is the requirement itself: after each step
    whatever has a marker and all its objects hashes to its name, and what is read is right.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.server = StorageServer([BUCKET]).start()
        self.server.deny("overwrite", "bucket_get")
        self.client = client_for(self.server.url)
        self.files = {"a": b"1", "b/c": b"22", "b/d": b"", "e": b"333"}
        self.path = make_tree(self.folder / "data", self.files)
        self.snapshots: list[Any] = [None, None]
        self.evicted = False

    def teardown(self) -> None:
        self.server.stop()
        shutil.rmtree(self.folder)

    def key(self, content_hash: str) -> CacheKey:
        return CacheKey(BUCKET, "default", content_hash)

    @rule(name=st.sampled_from(["a", "b/c", "b/d", "e"]), data=st.binary(max_size=2))
    def change(self, name: str, data: bytes) -> None:
        self.files[name] = data
        make_tree(self.path, {name: data})

    @rule(who=st.integers(0, 1))
    def hash(self, who: int) -> None:
        self.snapshots[who] = take_snapshot(self.path)

    @rule(who=st.integers(0, 1), dies_after=st.integers(0, 8))
    def publish(self, who: int, dies_after: int) -> None:
        """Go on from the hash, perhaps over bytes that have changed since, perhaps to die."""
        snapshot, self.snapshots[who] = self.snapshots[who], None
        if snapshot is None:
            return
        key = self.key(snapshot.content_hash)
        with MortalTransport(self.client, FAST, dies_after) as transport:
            store = GcsStore(BUCKET, transport)
            try:
                if isinstance(why := lookup(store, key, snapshot), str):
                    publish(store, key, snapshot, Progress(_log, "Uploading"), why)
            except (DiedError, DataChangedError):
                return
        assert key.marker_name in self.server.objects(BUCKET)

    @rule()
    def upload(self) -> None:
        result = do_upload(self.server.url, self.path)
        assert result.content_hash in hashes_of(self.files)
        assert find(BUCKET, result.content_hash, client=self.client, retry=FAST) is not None

    # How many objects there are after an upload was cut short is a matter of luck: what is drawn
    # must not depend on it, or hypothesis takes the strategies for flaky.
    @rule(which=st.integers(0, 15))
    def evict(self, which: int) -> None:
        if objects := sorted(self.server.objects(BUCKET)):
            self.server.delete(BUCKET, objects[which % len(objects)])

    @rule()
    def read(self) -> None:
        for content_hash in {n.split("/")[2] for n in self.server.objects(BUCKET)}:
            uri = f"gs://{BUCKET}/{prefix_of(content_hash)}".rstrip("/")
            found = find(BUCKET, content_hash, client=self.client, retry=FAST)
            dest = tempfile.mkdtemp(dir=self.folder) + "/back"
            try:
                read = read_tree(do_materialize(self.server.url, uri, dest))
            except IntegrityError:
                assert found is None
                assert not Path(dest).exists()
            else:
                assert content_hash in hashes_of(read)

    @invariant()
    def whole_entries_hash_to_their_names(self) -> None:
        objects = self.server.objects(BUCKET)
        for name in objects:
            content_hash = name.split("/")[2]
            if not name.endswith("/.cache_marker"):
                continue
            says = objects[name].data
            prefix = prefix_of(content_hash)
            files = {
                n.removeprefix(prefix): o.data
                for n, o in objects.items()
                if n.startswith(prefix) and n != name
            }
            if f'"files": {len(files)},'.encode() in says:
                assert content_hash in hashes_of(files)


TestInterleaving = Interleaving.TestCase
TestInterleaving.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
