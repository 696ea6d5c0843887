"""Answers that say less than usual, are compressed, or contradict each other.

Whatever a listing lacks, a dataset is published, found, healed, materialized and compared as in any
other bucket, and hardly any request is added.
"""

import gzip
from pathlib import Path
from typing import Any

import pytest
from faultkit import (
    BIG,
    BUCKET,
    FAST,
    Tap,
    client_for,
    content,
    content_hash_of,
    do_materialize,
    do_upload,
    make_tree,
    prefix_of,
    published,
    read_tree,
)
from test_hashed_bytes import CHANGES, SIZES, held_at
from test_hit import LAYOUTS, marker_name

from keras_remote_airflow.core.cloud.bucket import open_bucket
from keras_remote_airflow.core.cloud.store import list_objects
from keras_remote_airflow.core.datasets.lookup import find
from keras_remote_airflow.core.datasets.remote import list_source
from keras_remote_airflow.core.errors import (
    ConflictError,
    DataChangedError,
    EmptyDataError,
    IntegrityError,
    InvalidInputError,
    StoreError,
)
from keras_remote_airflow.testing import Fault, StorageServer

FILES = {"a.txt": b"a", "sub/b.bin": content(5000), "empty": b"", "two.bin": content(2 << 20, 2)}
VICTIM = "sub/b.bin"
CUSTOMER_MANAGED_KEY = {"crc32c", "md5Hash"}
PLAYS: dict[str, dict[str, Any]] = {
    "customer-managed key": {"listings_lack": CUSTOMER_MANAGED_KEY},
    "no sizes": {"listings_lack": {"size"}},
    "no generations": {"listings_lack": {"generation"}},
    "names alone": {"listings_lack": {"crc32c", "md5Hash", "size", "generation", "metadata"}},
    "compressed JSON": {"compresses_json": True},
    "compressed JSON, key": {"compresses_json": True, "listings_lack": CUSTOMER_MANAGED_KEY},
}


def stats(server: StorageServer) -> list[str | None]:
    """The objects that were asked for on their own, without their bytes."""
    return [
        request.object_name
        for request in server.requests
        if request.method == "GET" and request.object_name and "alt" not in request.query
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("play", PLAYS)
def test_every_journey_works(
    server: StorageServer, client: Any, tmp_path: Path, play: str, layout: Any
) -> None:
    server.play(**PLAYS[play])
    path = make_tree(tmp_path / "data", FILES)
    result = do_upload(server.url, path, layout=layout)
    assert result.content_hash
    assert published(server, layout) == {result.content_hash: set(FILES)}

    for verify in ("page", "full"):
        server.clear_requests()
        assert do_upload(server.url, path, layout=layout, verify=verify).cache_hit
        arguments: Any = {"client": client, "layout": layout, "verify": verify, "retry": FAST}
        assert find(BUCKET, result.content_hash, **arguments)
        if verify == "page":
            assert len(server.requests) == 4

    server.delete(BUCKET, prefix_of(result.content_hash) + VICTIM)
    assert find(BUCKET, result.content_hash, client=client, layout=layout, retry=FAST) is None
    assert do_upload(server.url, path, layout=layout).uploaded_files == 1

    dest = do_materialize(server.url, result.gcs_uri, str(tmp_path / "back"))
    assert read_tree(dest) == FILES
    (tmp_path / "back" / VICTIM).write_bytes(bytes(5000))
    with pytest.raises(InvalidInputError, match=VICTIM):
        do_materialize(server.url, result.gcs_uri, dest)

    server.put(BUCKET, prefix_of(result.content_hash) + VICTIM, bytes(5000))
    with pytest.raises(ConflictError, match=VICTIM):
        do_upload(server.url, path, layout=layout, verify="full")
    with pytest.raises(IntegrityError, match=VICTIM):
        do_materialize(server.url, result.gcs_uri, str(tmp_path / "other"))


@pytest.mark.parametrize("play", PLAYS)
def test_data_outside_a_cache_is_compared_with_what_is_stored(
    server: StorageServer, tmp_path: Path, play: str
) -> None:
    server.play(**PLAYS[play])
    for name, data in FILES.items():
        server.put(BUCKET, f"elsewhere/{name}", data)
    uri = f"gs://{BUCKET}/elsewhere"
    dest = do_materialize(server.url, uri, str(tmp_path / "back"))
    assert read_tree(dest) == FILES
    assert do_materialize(server.url, uri, dest) == dest
    server.put(BUCKET, f"elsewhere/{VICTIM}", bytes(5000))
    with pytest.raises(InvalidInputError, match=VICTIM):
        do_materialize(server.url, uri, dest)
    folder = str(tmp_path / "file")
    one = do_materialize(server.url, f"{uri}/{VICTIM}", folder, is_dir=False)
    assert Path(one).read_bytes() == bytes(5000)


def test_objects_of_another_client_are_asked_for_only_where_it_matters(
    server: StorageServer, client: Any, tmp_path: Path
) -> None:
    server.play(listings_lack=CUSTOMER_MANAGED_KEY)
    path = make_tree(tmp_path / "data", FILES)
    content_hash = content_hash_of(path)
    for name, data in FILES.items():
        server.put(BUCKET, prefix_of(content_hash) + name, data)  # without our digest
    # A marker is written only over objects whose checksums are known.
    assert do_upload(server.url, path).uploaded_files == 0
    assert len(stats(server)) == len(FILES)
    cases: Any = (("page", 0), ("full", len(FILES)))
    for verify, asked in cases:
        server.clear_requests()
        assert do_upload(server.url, path, verify=verify).cache_hit
        assert find(BUCKET, content_hash, client=client, verify=verify, retry=FAST)
        assert len(stats(server)) == asked
    server.put(BUCKET, prefix_of(content_hash) + VICTIM, bytes(5000))
    server.delete(BUCKET, marker_name(content_hash, "keras_remote"))
    with pytest.raises(ConflictError, match=VICTIM):
        do_upload(server.url, path)
    assert published(server) == {}


def test_a_damaged_download_heals_where_only_its_headers_tell_the_checksum(
    server: StorageServer, tmp_path: Path
) -> None:
    server.play(listings_lack=PLAYS["names alone"]["listings_lack"])
    result = do_upload(server.url, make_tree(tmp_path / "data", FILES))
    for action in ("corrupt", "bad_hash", "truncate"):
        server.add_fault(Fault(path=r"two\.bin\?.*alt=media", action=action))
    dest = do_materialize(server.url, result.gcs_uri, str(tmp_path / "back"))
    assert read_tree(dest) == FILES


@pytest.mark.parametrize("play", PLAYS)
def test_objects_stored_in_gzip_arrive_as_they_are_stored(
    server: StorageServer, tmp_path: Path, play: str
) -> None:
    packed = gzip.compress(b"text" * 1000)
    blob = client_for(server.url).bucket(BUCKET).blob("logs/text.gz")
    blob.content_encoding = "gzip"
    blob.upload_from_string(packed)
    server.play(**PLAYS[play])
    dest = do_materialize(server.url, f"gs://{BUCKET}/logs", str(tmp_path / "back"))
    assert read_tree(dest) == {"text.gz": packed}


def test_errors_in_compressed_json_are_understood(server: StorageServer, client: Any) -> None:
    server.play(compresses_json=True)
    with pytest.raises(StoreError, match="no-such-bucket") as raised:
        find("no-such-bucket", "0" * 64, client=client, retry=FAST)
    assert raised.value.status == 404
    server.deny("list")
    with pytest.raises(StoreError, match=r"403.*storage\.objects\.list"):
        list_source(f"gs://{BUCKET}/x/", client=client, retry=FAST)


SESSION_RANGES = {
    "garbage": "bytes=0-x",
    "whole file": f"bytes=0-{BIG - 1}",
    "too much": "0-99999999",
}


@pytest.mark.parametrize("received", SESSION_RANGES)
def test_a_session_that_says_nonsense_is_left(
    server: StorageServer, tmp_path: Path, received: str
) -> None:
    path = make_tree(tmp_path / "data", {"big": content(BIG)})
    nonsense = {"Range": SESSION_RANGES[received]}
    server.add_fault(Fault(method="PUT", action="drop_before", after_bytes=1 << 20))
    server.add_fault(Fault(method="PUT", nth=2, status=308, headers=nonsense))
    if received == "garbage":
        with pytest.raises(StoreError, match="bytes=0-x"):
            do_upload(server.url, path)
        assert published(server) == {}
    else:
        assert do_upload(server.url, path).uploaded_files == 1
        assert len(published(server)) == 1


# A server that checks nothing, and one that answers 412 to bytes that are not the declared ones.


@pytest.mark.parametrize("size", SIZES)
def test_a_changed_file_is_not_published_on_a_server_that_checks_nothing(
    server: StorageServer, tmp_path: Path, size: str
) -> None:
    server.play(checks_hashes=False)
    path = make_tree(tmp_path / "data", {"file": content(SIZES[size])})
    with held_at(server, path, path=r"/o\?prefix") as uploading:
        CHANGES["flip_a_bit_keeping_mtime"](tmp_path / "data" / "file")
    with pytest.raises(DataChangedError, match=r"data/file\. Nothing was published"):
        uploading.result()
    assert published(server) == {}


@pytest.mark.parametrize("size", SIZES)
def test_bytes_damaged_on_the_way_are_not_published_on_a_server_that_checks_nothing(
    server: StorageServer, tmp_path: Path, size: str
) -> None:
    server.play(checks_hashes=False)
    path = make_tree(tmp_path / "data", {"file": content(SIZES[size])})
    with Tap(server.url, flip_at=SIZES[size] // 2 + 2000) as tap:
        with pytest.raises(ConflictError, match="gcloud storage rm"):
            do_upload(tap.url, path)
        assert tap.flipped == 1
    assert published(server) == {}


def test_a_damaged_marker_is_not_taken_for_one(server: StorageServer, client: Any) -> None:
    body = b"m" * 5000
    with Tap(server.url, flip_at=3000) as tap, open_bucket(BUCKET, client_for(tap.url)) as store:
        assert store.create("checked", body)
        assert tap.flipped == 1
    assert server.objects(BUCKET)["checked"].data == body
    server.play(checks_hashes=False)
    with (
        Tap(server.url, flip_at=3000) as tap,
        open_bucket(BUCKET, client_for(tap.url)) as store,
        pytest.raises(ConflictError, match="unchecked"),
    ):
        store.create("unchecked", body)


BAD_CHECKSUM = {"small": r"uploadType=multipart", "session": r"upload_id="}


@pytest.mark.parametrize("size", BAD_CHECKSUM)
def test_412_for_a_bad_checksum_is_no_conflict(
    server: StorageServer, tmp_path: Path, size: str
) -> None:
    path = make_tree(tmp_path / "data", {"file": content(SIZES[size])})
    server.add_fault(Fault(path=BAD_CHECKSUM[size], status=412))
    assert do_upload(server.url, path).uploaded_files == 1
    assert len(published(server)) == 1


@pytest.mark.parametrize("size", BAD_CHECKSUM)
def test_412_for_a_changed_file_names_the_file(
    server: StorageServer, tmp_path: Path, size: str
) -> None:
    path = make_tree(tmp_path / "data", {"file": content(SIZES[size])})
    with held_at(server, path, path=r"/o\?prefix") as uploading:
        CHANGES["flip_a_bit_keeping_mtime"](tmp_path / "data" / "file")
        server.add_fault(Fault(path=BAD_CHECKSUM[size], status=412))
        server.add_fault(Fault(path=BAD_CHECKSUM[size], status=400, times=0))
    with pytest.raises(DataChangedError, match=r"data/file\. Nothing was published"):
        uploading.result()
    assert server.objects(BUCKET) == {}


@pytest.mark.parametrize("size", BAD_CHECKSUM)
def test_an_object_that_is_there_and_not_there_is_given_up_on(
    server: StorageServer, tmp_path: Path, size: str
) -> None:
    path = make_tree(tmp_path / "data", {"file": content(SIZES[size])})
    server.add_fault(Fault(path=BAD_CHECKSUM[size], status=412, times=0))
    with pytest.raises(StoreError, match=r"412.*404") as raised:
        do_upload(server.url, path)
    assert raised.value.transient
    assert len(server.requests) < 20


# What is at a gs:// URI.


def test_a_source_is_listed_once_and_has_a_fingerprint(server: StorageServer, client: Any) -> None:
    for name, data in {"b": b"123456789", "a/ä": b"", "a/": b"", "other": b"x"}.items():
        server.put(BUCKET, ("" if name == "other" else "raw/") + name, data)
    server.clear_requests()
    source = list_source(f"gs://{BUCKET}/raw/", client=client, retry=FAST)
    assert (source.files, source.bytes, len(server.requests)) == (2, 9, 1)
    # SHA-256 of "a/ä", 0, "0", 0, "AAAAAA==", 0, "b", 0, "9", 0, "4waSgw==", 0
    assert source.fingerprint == "437b2daacbd7bd342c4ce4054ef13f250a6eb7167b322071082fa4e71da2f0da"
    one = list_source(f"gs://{BUCKET}/raw/b", client=client, retry=FAST)
    assert (one.files, one.bytes) == (1, 9)
    server.put(BUCKET, "raw/b", b"123456780")
    changed = list_source(f"gs://{BUCKET}/raw/", client=client, retry=FAST)
    assert (changed.files, changed.bytes) == (2, 9)
    assert changed.fingerprint != source.fingerprint
    assert list_source(f"gs://{BUCKET}/raw/b", client=client).fingerprint != one.fingerprint


@pytest.mark.parametrize("play", PLAYS)
def test_a_source_has_a_fingerprint_in_every_bucket(
    server: StorageServer, client: Any, play: str
) -> None:
    server.play(**PLAYS[play])
    for number in range(3):
        server.put(BUCKET, f"raw/{number}", b"x" * number)
    source = list_source(f"gs://{BUCKET}/raw/", client=client, retry=FAST)
    assert (source.files, source.bytes) == (3, 3)
    assert list_source(f"gs://{BUCKET}/raw/", client=client, retry=FAST) == source
    server.put(BUCKET, "raw/2", b"yy")
    changed = list_source(f"gs://{BUCKET}/raw/", client=client, retry=FAST)
    assert changed.fingerprint != source.fingerprint


def test_a_source_and_a_copy_have_every_object(
    server: StorageServer, client: Any, tmp_path: Path
) -> None:
    files = {".cache_marker": b"{}", "sub/.cache_marker": b"", "a": b"1"}
    for name, data in files.items():
        server.put(BUCKET, f"raw/{name}", data)
    assert list_source(f"gs://{BUCKET}/raw/", client=client).files == len(files)
    assert read_tree(do_materialize(server.url, f"gs://{BUCKET}/raw", str(tmp_path / "x"))) == files
    server.put(BUCKET, "raw/sub/", b"bytes in a folder's place")
    assert list_source(f"gs://{BUCKET}/raw/", client=client).files == len(files) + 1
    with pytest.raises(InvalidInputError, match="sub/"):
        do_materialize(server.url, f"gs://{BUCKET}/raw", str(tmp_path / "y"))


@pytest.mark.parametrize("name", ["raw/", "raw", "ra", "raw/x", ""])
def test_a_source_without_objects_is_an_error_that_retries_may_mend(
    server: StorageServer, client: Any, name: str
) -> None:
    if name:
        server.put(BUCKET, "raw/", b"")  # a "folder" object is no data
    with pytest.raises(EmptyDataError, match=f"gs://{BUCKET}/{name}"):
        list_source(f"gs://{BUCKET}/{name}", client=client, retry=FAST)
    with pytest.raises(InvalidInputError):
        list_source("s3://bucket/x", client=client)
    assert not list(list_objects_of(client, "elsewhere/"))


def list_objects_of(client: Any, prefix: str) -> list[str]:
    with open_bucket(BUCKET, client, retry=FAST) as store:
        return [info.name for info in list_objects(store, prefix)]
