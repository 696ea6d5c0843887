"""Guarantee 4: a hit is a hit only while the objects are there and the marker can be read."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from faultkit import (
    BUCKET,
    FAST,
    content_hash_of,
    do_materialize,
    do_upload,
    make_tree,
    prefix_of,
    published,
    small_files,
)
from test_hashed_bytes import held_at

from keras_remote_airflow.core.datasets.lookup import CacheEntry, find
from keras_remote_airflow.core.errors import IntegrityError, MarkerError
from keras_remote_airflow.core.layout import LayoutName
from keras_remote_airflow.testing import StorageServer

FILES = small_files(5)
EVICTIONS = {"one": 1, "some": 3, "all": 5}
LAYOUTS = {"keras_remote": ".cache_marker", "kinetic": "../../data-markers/"}


def marker_name(content_hash: str, layout: LayoutName) -> str:
    if layout == "kinetic":
        return f"default/data-markers/{content_hash}"
    return prefix_of(content_hash) + ".cache_marker"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("how_many", EVICTIONS)
def test_evicted_objects_turn_a_hit_into_a_miss_that_heals(
    server: StorageServer,
    client: Any,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    how_many: str,
    layout: LayoutName,
) -> None:
    path = make_tree(tmp_path / "data", FILES)
    result = do_upload(server.url, path, layout=layout)
    assert result.content_hash is not None
    gone = list(FILES)[: EVICTIONS[how_many]]
    for name in gone:
        server.delete(BUCKET, prefix_of(result.content_hash) + name)

    found = find(BUCKET, result.content_hash, client=client, layout=layout, retry=FAST)
    assert found is None
    assert result.gcs_uri in caplog.text
    with pytest.raises(IntegrityError):
        do_materialize(server.url, result.gcs_uri, str(tmp_path / "back"))

    healed = do_upload(server.url, path, layout=layout)
    assert not healed.cache_hit
    assert (healed.uploaded_files, healed.content_hash) == (len(gone), result.content_hash)
    assert find(BUCKET, result.content_hash, client=client, layout=layout, retry=FAST)
    assert published(server, layout) == {result.content_hash: set(FILES)}


def test_a_hit_writes_nothing_and_takes_two_requests(server: StorageServer, tmp_path: Path) -> None:
    path = make_tree(tmp_path / "data", FILES)
    do_upload(server.url, path)
    server.clear_requests()
    assert do_upload(server.url, path).cache_hit
    assert [r.method for r in server.requests] == ["GET", "GET"]


def test_verify_full_sees_what_lies_beyond_the_first_page(
    server: StorageServer, client: Any, tmp_path: Path
) -> None:
    path = make_tree(tmp_path / "data", {f"{i:04}": b"" for i in range(1002)})
    result = do_upload(server.url, path)
    assert result.content_hash is not None
    server.delete(BUCKET, prefix_of(result.content_hash) + "1001")
    arguments = {"client": client, "retry": FAST}
    assert find(BUCKET, result.content_hash, verify="page", **arguments)
    assert find(BUCKET, result.content_hash, verify="full", **arguments) is None
    assert do_upload(server.url, path, verify="page").cache_hit
    assert do_upload(server.url, path, verify="full").uploaded_files == 1
    assert find(BUCKET, result.content_hash, verify="full", **arguments)


def receipt(**changes: object) -> bytes:
    fields = {"format_version": 1, "content_hash": "HASH", "is_dir": True}
    size = sum(map(len, FILES.values()))
    return json.dumps(fields | {"files": len(FILES), "bytes": size} | changes).encode()


BAD_MARKERS = {
    "no JSON": b"{",
    "no object": b"[]",
    "not UTF-8": b"\xff\xfe",
    "deep": b"[" * 50_000,
    "newer": receipt(format_version=2),
    "version zero": receipt(format_version=0),
    "version is text": receipt(format_version="one"),
    "version missing": b'{"content_hash": "HASH"}',
    "other hash": receipt(content_hash="0" * 64),
    "files is text": receipt(files="5"),
    "is_dir is a number": receipt(is_dir=1),
    "ten megabytes": receipt() + b" " * (10 << 20),
}


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("body", BAD_MARKERS)
def test_a_marker_that_cannot_be_read_is_an_error(
    server: StorageServer, client: Any, tmp_path: Path, body: str, layout: LayoutName
) -> None:
    path = make_tree(tmp_path / "data", FILES)
    content_hash = content_hash_of(path)
    name = marker_name(content_hash, layout)
    server.put(BUCKET, name, BAD_MARKERS[body].replace(b"HASH", content_hash.encode()))
    with pytest.raises(MarkerError, match=f"gs://{BUCKET}/{name}"):
        find(BUCKET, content_hash, client=client, layout=layout, retry=FAST)
    with pytest.raises(MarkerError, match=f"gs://{BUCKET}/{name}"):
        do_upload(server.url, path, layout=layout)
    assert list(server.objects(BUCKET)) == [name]


def test_a_receipt_for_other_figures_is_no_hit(
    server: StorageServer, client: Any, tmp_path: Path
) -> None:
    path = make_tree(tmp_path / "data", FILES)
    content_hash = content_hash_of(path)
    wrong = receipt(files=4).replace(b"HASH", content_hash.encode())
    server.put(BUCKET, marker_name(content_hash, "keras_remote"), wrong)
    # Else the operator would call it a hit for which the sensor waits for ever.
    with pytest.raises(MarkerError, match="files"):
        do_upload(server.url, path)
    assert find(BUCKET, content_hash, client=client, retry=FAST) is None


def test_an_empty_marker_from_another_client_is_a_hit(
    server: StorageServer, client: Any, tmp_path: Path
) -> None:
    path = make_tree(tmp_path / "data", FILES)
    content_hash = content_hash_of(path)
    prefix = prefix_of(content_hash)
    for name, data in FILES.items():
        server.put(BUCKET, prefix + name, data)
    server.put(BUCKET, prefix + ".cache_marker", b"")
    expected = CacheEntry(f"gs://{BUCKET}/{prefix[:-1]}", None, None, None)
    assert find(BUCKET, content_hash, client=client, retry=FAST) == expected
    assert do_upload(server.url, path).cache_hit
    for name in FILES:
        server.delete(BUCKET, prefix + name)
    assert find(BUCKET, content_hash, client=client, retry=FAST) is None
    assert do_upload(server.url, path).uploaded_files == len(FILES)


def test_other_bytes_of_another_size_are_no_hit(
    server: StorageServer, client: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    result = do_upload(server.url, make_tree(tmp_path / "data", FILES))
    assert result.content_hash is not None
    server.put(BUCKET, prefix_of(result.content_hash) + next(iter(FILES)), b"?")
    with caplog.at_level(logging.WARNING):
        assert find(BUCKET, result.content_hash, client=client, retry=FAST) is None


def test_a_marker_that_is_evicted_when_it_is_looked_at_is_written_anew(
    server: StorageServer, tmp_path: Path
) -> None:
    path = make_tree(tmp_path / "data", FILES)
    content_hash = content_hash_of(path)
    name = marker_name(content_hash, "keras_remote")
    server.put(BUCKET, name, b"")
    # The marker is read before the objects are listed and after they are stored.
    with held_at(server, path, path=r"cache_marker\?", nth=2) as uploading:
        server.delete(BUCKET, name)
    assert uploading.result().uploaded_files == len(FILES)
    assert set(published(server)) == {content_hash}
