"""`find`: every state a cache entry can be in."""

import json
import logging

import pytest

from keras_remote_airflow.core.datasets.lookup import CacheEntry, find
from keras_remote_airflow.core.datasets.upload import upload
from keras_remote_airflow.core.errors import (
    ConflictError,
    InvalidInputError,
    MarkerError,
    StoreError,
)
from keras_remote_airflow.core.layout import LayoutName

from .test_layout import BAD_BUCKETS, BAD_HASHES, BAD_NAMESPACES, GARBAGE_MARKERS

FILES = {"train.csv": "train", "sub/eval.csv": "eval"}
HASH = "0123456789abcdef" * 4
EMPTY = "9d1ae5a6cdbe837d499a16cb32234ea2d953c60e8e8fdc88f84a3bbe2d629143"
MARKERS: dict[LayoutName, str] = {
    "keras_remote": "default/data-cache/{}/.cache_marker",
    "kinetic": "default/data-markers/{}",
}


@pytest.fixture(params=MARKERS)
def layout(request):
    return request.param


@pytest.fixture
def published(tree, bucket, layout):
    return upload(bucket.name, str(tree(FILES)), layout=layout)


def put(bucket, name, content):
    bucket.blob(name).upload_from_string(content)


def test_absent_entry_is_none(gcs_bucket, layout):
    assert find(gcs_bucket, HASH, layout=layout) is None


def test_published_entry_tells_what_it_holds(gcs_bucket, layout, published):
    assert find(gcs_bucket, published.content_hash, layout=layout) == CacheEntry(
        published.gcs_uri, True, 2, 9
    )


def test_marker_that_does_not_say_when_it_was_written_gives_no_time(bucket, layout, published):
    marker = bucket.blob(MARKERS[layout].format(published.content_hash))
    receipt = json.loads(marker.download_as_bytes())
    assert find(bucket.name, published.content_hash, layout=layout).published_at
    del receipt["created_at"]
    marker.upload_from_string(json.dumps(receipt))
    assert find(bucket.name, published.content_hash, layout=layout).published_at is None


def test_published_file_is_no_directory(tree, gcs_bucket, layout):
    result = upload(gcs_bucket, str(tree({"a": "x"}) / "a"), layout=layout)
    assert find(gcs_bucket, result.content_hash, layout=layout) == CacheEntry(
        result.gcs_uri, False, 1, 1
    )


def test_other_namespace_and_other_layout_are_other_places(gcs_bucket, layout, published):
    [other] = set(MARKERS) - {layout}
    assert find(gcs_bucket, published.content_hash, layout=other) is None
    assert find(gcs_bucket, published.content_hash, None, "team", layout=layout) is None


def test_empty_marker_with_objects_is_an_entry_that_says_nothing_of_its_kind(bucket, layout):
    put(bucket, f"default/data-cache/{HASH}/train.csv", b"t")
    put(bucket, MARKERS[layout].format(HASH), b"")
    uri = f"gs://{bucket.name}/default/data-cache/{HASH}"
    assert find(bucket.name, HASH, layout=layout) == CacheEntry(uri, None, None, None)


def test_empty_marker_without_objects_is_a_miss_and_the_log_says_why(bucket, layout, caplog):
    put(bucket, MARKERS[layout].format(HASH), b"")
    with caplog.at_level(logging.WARNING):
        assert find(bucket.name, HASH, layout=layout) is None
    assert "no objects" in caplog.text
    assert HASH in caplog.text


def test_empty_marker_is_enough_for_the_empty_directory(bucket, layout):
    put(bucket, MARKERS[layout].format(EMPTY), b"")
    assert find(bucket.name, EMPTY, layout=layout) is not None


@pytest.mark.parametrize("gone", [["train.csv"], ["sub/eval.csv"], ["train.csv", "sub/eval.csv"]])
def test_evicted_entry_is_a_miss_and_heals(tree, bucket, layout, published, gone, caplog):
    for name in gone:
        bucket.blob(f"default/data-cache/{published.content_hash}/{name}").delete()
    with caplog.at_level(logging.WARNING):
        assert find(bucket.name, published.content_hash, layout=layout) is None
    assert "lifecycle" in caplog.text
    healed = upload(bucket.name, str(tree(FILES, "again")), layout=layout)
    assert healed.uploaded_files == len(gone)
    assert find(bucket.name, published.content_hash, layout=layout)


def test_object_more_than_the_marker_says_is_a_conflict(bucket, layout, published):
    put(bucket, f"default/data-cache/{published.content_hash}/stray", b"")
    # An upload does not mend it, so a sensor must not wait for one.
    with pytest.raises(ConflictError, match=rf"\b3\b.*\b2\b.*{published.gcs_uri}"):
        find(bucket.name, published.content_hash, layout=layout)


def test_objects_without_a_marker_are_a_miss(bucket, layout):
    put(bucket, f"default/data-cache/{HASH}/train.csv", b"t")
    assert find(bucket.name, HASH, layout=layout) is None


def test_newer_marker_is_an_error_and_no_miss(bucket, layout):
    put(bucket, MARKERS[layout].format(HASH), b'{"format_version": 2, "shards": []}')
    with pytest.raises(MarkerError, match="format_version 2"):
        find(bucket.name, HASH, layout=layout)


@pytest.mark.usefixtures("no_collection")
def test_garbage_marker_is_an_error_that_names_it(bucket):
    for body in GARBAGE_MARKERS:
        put(bucket, MARKERS["keras_remote"].format(HASH), body)
        with pytest.raises(MarkerError, match=r"\.cache_marker"):
            find(bucket.name, HASH)


def test_missing_bucket_is_an_error_and_no_miss(gcs_bucket, layout):
    with pytest.raises(StoreError, match="no-such-bucket-here") as caught:
        find("no-such-bucket-here", HASH, layout=layout)
    assert (caught.value.status, caught.value.transient) == (404, False)


def test_looking_never_writes(gcs_server, tree, gcs_bucket):
    result = upload(gcs_bucket, str(tree(FILES)))
    gcs_server.clear_requests()
    for verify in ("page", "full"):
        find(gcs_bucket, result.content_hash, verify=verify)
    find(gcs_bucket, HASH)
    assert {request.method for request in gcs_server.requests} == {"GET"}


@pytest.mark.parametrize(
    "arguments",
    [(bucket, HASH) for bucket in BAD_BUCKETS]
    + [("test-bucket", content_hash) for content_hash in BAD_HASHES]
    + [("test-bucket", HASH, None, namespace) for namespace in BAD_NAMESPACES],
    ids=repr,
)
def test_bad_arguments_are_refused_without_a_client(arguments, monkeypatch):
    from google.cloud import storage

    monkeypatch.setattr(storage, "Client", lambda **_: pytest.fail("a client was made"))
    with pytest.raises(InvalidInputError):
        find(*arguments)
