"""`upload` and `upload_data`: what a miss writes, what a hit does not."""

import json
import logging
import re
import time

import pytest

from keras_remote_airflow import Data, upload_data
from keras_remote_airflow.core.cloud.gcs import DIGEST_KEY
from keras_remote_airflow.core.datasets.lookup import Verify
from keras_remote_airflow.core.datasets.upload import (
    LARGE_BYTES,
    UploadResult,
    upload,
    warn_of_odd_data,
)
from keras_remote_airflow.core.disk.hashing import take_snapshot
from keras_remote_airflow.core.errors import (
    PERMANENT_ERRORS,
    EmptyDataError,
    InvalidInputError,
    MarkerError,
)
from keras_remote_airflow.testing import Fault

from . import reference
from .conftest import stored, writes, written_names

FILES = {"train.csv": "t", "sub/eval.csv": "e"}
HASH = "15d41417b45aa09c0450d8955b845bb278f2990728bcc5d919d62309a2c6ebee"
PREFIX = f"default/data-cache/{HASH}"
EMPTY = "9d1ae5a6cdbe837d499a16cb32234ea2d953c60e8e8fdc88f84a3bbe2d629143"


def test_miss_stores_every_file_and_the_marker(tree, bucket):
    uri = upload_data(bucket.name, Data(str(tree(FILES))))
    assert uri == f"gs://{bucket.name}/{PREFIX}"
    objects = stored(bucket)
    receipt = json.loads(objects.pop(f"{PREFIX}/.cache_marker"))
    assert objects == {f"{PREFIX}/train.csv": b"t", f"{PREFIX}/sub/eval.csv": b"e"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", receipt.pop("created_at"))
    assert re.fullmatch(r"keras_remote_airflow/\d+\.\d+\.\d+", receipt.pop("created_by"))
    assert receipt == {
        "format_version": 1,
        "content_hash": HASH,
        "is_dir": True,
        "files": 2,
        "bytes": 2,
    }


def test_result_tells_what_a_miss_did_and_what_a_hit_did_not(tree, gcs_bucket):
    path = str(tree(FILES))
    uri = f"gs://{gcs_bucket}/{PREFIX}"
    miss, hit = upload(gcs_bucket, path), upload(gcs_bucket, path)
    assert miss == UploadResult(uri, True, HASH, False, 2, 2, 2, 2, miss.seconds)
    assert hit == UploadResult(
        uri, True, HASH, True, 2, 2, 0, 0, hit.seconds, published_at=hit.published_at
    )
    assert miss.published_at is None
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", hit.published_at)
    assert hit.seconds > 0


def test_stats_are_exactly_these_and_survive_json(tree, gcs_bucket):
    result = upload(gcs_bucket, str(tree(FILES)))
    assert json.loads(json.dumps(result.stats())) == {
        "content_hash": HASH,
        "cache_hit": False,
        "files": 2,
        "bytes": 2,
        "uploaded_files": 2,
        "uploaded_bytes": 2,
        "seconds": result.seconds,
        "fingerprint": None,
    }


def test_marker_is_written_after_every_object(tree, gcs_server, gcs_bucket):
    # Every data object takes its time: a marker that did not wait would come first.
    gcs_server.add_fault(Fault(method="POST", times=50, latency=0.2))
    files = {f"{number}.bin": bytes([number]) for number in range(50)}
    result = upload(gcs_bucket, str(tree(files)))
    names = written_names(gcs_server)
    prefix = f"default/data-cache/{result.content_hash}/"
    assert names[-1] == f"{prefix}.cache_marker"
    assert sorted(names[:-1]) == sorted(prefix + name for name in files)


def test_hit_writes_nothing_and_asks_twice(tree, gcs_server, gcs_bucket):
    path = str(tree(FILES))
    upload(gcs_bucket, path)
    gcs_server.clear_requests()
    assert upload(gcs_bucket, path).cache_hit
    assert [(r.method, r.object_name) for r in gcs_server.requests] == [
        ("GET", f"{PREFIX}/.cache_marker"),
        ("GET", None),
    ]


def test_nothing_but_reading_and_creating_is_ever_needed(tree, gcs_server, gcs_bucket):
    gcs_server.deny("overwrite", "delete", "update", "bucket_get", "bucket_create")
    for _ in range(2):
        upload(gcs_bucket, str(tree(FILES, f"copy-{_}")))
    assert {request.method for request in gcs_server.requests} == {"GET", "POST"}


def test_same_content_elsewhere_is_a_hit(tree, gcs_bucket):
    upload(gcs_bucket, str(tree(FILES, "monday")))
    assert upload(gcs_bucket, str(tree(FILES, "tuesday"))).cache_hit


def test_changed_content_is_another_dataset(tree, gcs_bucket):
    root = tree(FILES)
    before = upload(gcs_bucket, str(root))
    (root / "train.csv").write_text("T")
    after = upload(gcs_bucket, str(root))
    assert not after.cache_hit
    assert after.gcs_uri != before.gcs_uri


def test_single_file_goes_below_its_hash_under_its_own_name(tree, bucket):
    path = tree({"config.json": '{"a":1}'}) / "config.json"
    result = upload(bucket.name, Data(str(path)))
    digest = "915c1cc0e2fface2fc152b6d831ef33f937fb56ce777f8d8e22c37c9a96dbc43"
    assert result.gcs_uri == f"gs://{bucket.name}/default/data-cache/{digest}"
    assert (result.is_dir, result.files, result.bytes) == (False, 1, 7)
    objects = stored(bucket)
    assert objects[f"default/data-cache/{digest}/config.json"] == b'{"a":1}'
    assert json.loads(objects[f"default/data-cache/{digest}/.cache_marker"])["is_dir"] is False
    assert upload(bucket.name, str(path)).cache_hit


def test_empty_directory_is_a_marker_and_nothing_else(tree, bucket):
    root = str(tree({}))
    result = upload(bucket.name, root)
    assert (result.content_hash, result.files, result.cache_hit) == (EMPTY, 0, False)
    assert list(stored(bucket)) == [f"default/data-cache/{EMPTY}/.cache_marker"]
    assert upload(bucket.name, root).cache_hit


@pytest.mark.parametrize("layouts", [("keras_remote", "kinetic"), ("kinetic", "keras_remote")])
def test_layouts_share_the_data_and_keep_their_own_markers(tree, gcs_server, gcs_bucket, layouts):
    path = str(tree(FILES))
    markers = {
        "keras_remote": f"{PREFIX}/.cache_marker",
        "kinetic": f"default/data-markers/{HASH}",
    }
    first, second = (upload(gcs_bucket, path, layout=layout) for layout in layouts)
    assert first.gcs_uri == second.gcs_uri
    assert (first.uploaded_files, second.uploaded_files) == (2, 0)
    assert written_names(gcs_server)[-2:] == [markers[layout] for layout in layouts]
    for layout in layouts:
        assert upload(gcs_bucket, path, layout=layout).cache_hit


def test_namespaces_are_kept_apart(tree, bucket):
    path = str(tree(FILES))
    uri = upload_data(bucket.name, path, None, "team/project")
    assert uri == f"gs://{bucket.name}/team/project/data-cache/{HASH}"
    assert not upload(bucket.name, path).cache_hit
    assert len(stored(bucket)) == 6


@pytest.mark.parametrize("uri", ["gs://elsewhere/data/", "gs://elsewhere/data/train.csv"])
def test_cloud_storage_data_touches_no_network(uri, monkeypatch):
    from google.cloud import storage

    monkeypatch.setattr(storage, "Client", lambda **_: pytest.fail("a client was made"))
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")
    assert upload_data("some-bucket", Data(uri)) == uri
    result = upload("some-bucket", uri)
    assert result == UploadResult(uri, uri.endswith("/"))
    assert result.stats()["content_hash"] is None


def test_given_client_is_used_and_left_open(tree, bucket, monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:1")
    upload(bucket.name, str(tree(FILES)), client=bucket.client)
    assert len(stored(bucket)) == 3


def test_each_object_carries_the_digest_of_its_file(tree, bucket):
    upload(bucket.name, str(tree(FILES)))
    for relative, content in FILES.items():
        blob = bucket.get_blob(f"{PREFIX}/{relative}")
        digest = reference.file_digest(relative, content.encode())
        assert blob.metadata == {DIGEST_KEY: digest.hex()}


@pytest.mark.slow
def test_requests_are_in_flight_together(tree, gcs_server, gcs_bucket):
    gcs_server.latency = 0.5
    files = {f"{number}.bin": bytes([number]) for number in range(60)}
    started = time.monotonic()
    upload(gcs_bucket, str(tree(files)))
    assert time.monotonic() - started < 60 * 0.5 / 2, "one after the other takes 30 s"


def test_evicted_objects_are_uploaded_again_and_nothing_else(tree, gcs_server, gcs_bucket):
    path = str(tree(FILES))
    upload(gcs_bucket, path)
    gcs_server.delete(gcs_bucket, f"{PREFIX}/sub/eval.csv")
    gcs_server.clear_requests()
    healed = upload(gcs_bucket, path)
    assert (healed.cache_hit, healed.uploaded_files) == (False, 1)
    assert gcs_server.objects(gcs_bucket)[f"{PREFIX}/sub/eval.csv"].data == b"e"
    assert upload(gcs_bucket, path).cache_hit


def test_log_says_how_much_was_evicted_and_from_where_it_is_restored(
    tree, gcs_server, gcs_bucket, caplog
):
    path = str(tree(FILES))
    upload(gcs_bucket, path)
    gcs_server.delete(gcs_bucket, f"{PREFIX}/sub/eval.csv")
    caplog.set_level(logging.INFO)
    upload(gcs_bucket, path)
    for fact in ("Uploading 1 of 2 files", "Uploaded 1 of 2 files"):
        [line] = [text for text in caplog.messages if text.startswith(fact)]
        assert "1 of 2 objects missing" in line[:90]
        assert f" {path} " in line


def test_hit_on_a_thousand_files_and_more_reads_one_page_unless_told_to_read_all(
    tree, gcs_server, gcs_bucket
):
    path = str(tree({f"{number:04}": "" for number in range(1100)}))
    result = upload(gcs_bucket, path)
    expected: dict[Verify, int] = {"page": 2, "full": 3}
    for verify, requests in expected.items():
        gcs_server.clear_requests()
        assert upload(gcs_bucket, path, verify=verify).cache_hit
        assert len(gcs_server.requests) == requests
    gcs_server.delete(gcs_bucket, f"default/data-cache/{result.content_hash}/1099")
    assert upload(gcs_bucket, path).cache_hit
    assert upload(gcs_bucket, path, verify="full").uploaded_files == 1


def test_unreadable_marker_stops_the_upload(tree, gcs_server, gcs_bucket):
    gcs_server.put(gcs_bucket, f"{PREFIX}/.cache_marker", b'{"format_version": 2}')
    with pytest.raises(MarkerError, match="format_version 2"):
        upload(gcs_bucket, str(tree(FILES)))
    assert writes(gcs_server) == []


def test_data_of_more_than_ten_gibibytes_draws_a_warning(tree, caplog):
    snapshot = take_snapshot(str(tree(FILES)))
    warn_of_odd_data(snapshot)
    assert caplog.records == []
    snapshot.total_bytes = LARGE_BYTES + 1  # as if; 10 GiB would take a while to hash
    warn_of_odd_data(snapshot)
    [record] = caplog.records
    assert snapshot.root in record.getMessage()
    assert "10.7 GB" in record.getMessage()


def test_log_says_one_file_and_two_files(tree, gcs_bucket, caplog):
    caplog.set_level(logging.INFO)
    upload(gcs_bucket, str(tree({"a": "1"})))
    assert re.search(r"Uploaded 1 of 1 file \(", caplog.text)


def test_one_line_of_log_for_one_outcome(tree, gcs_bucket, caplog):
    path = str(tree(FILES))
    for fact, outcome in (
        ("Uploaded 2 of 2 files (2 B of 2 B)", "cache miss (no marker)"),
        ("Uploaded 0 of 2 files (0 B of 2 B)", "cache hit"),
    ):
        caplog.clear()
        with caplog.at_level(logging.INFO, "keras_remote_airflow"):
            uri = upload_data(gcs_bucket, path)
        [line] = [text for text in caplog.messages if text.startswith(fact)]
        assert outcome in line[:90]
        assert line.endswith(f": {path} to {uri}")


@pytest.mark.parametrize("option", [{"verify": "none"}, {"layout": "g0"}])
def test_unknown_option_is_refused_before_anything_is_read(option, gcs_server, gcs_bucket):
    with pytest.raises(InvalidInputError, match="unknown"):
        upload(gcs_bucket, "/not/even/there", **option)
    assert gcs_server.requests == []


@pytest.mark.parametrize("linked", [False, True])
def test_directory_without_files_is_published_with_a_warning(linked, tmp_path, gcs_bucket, caplog):
    if linked:
        (tmp_path / "elsewhere").symlink_to("/usr", target_is_directory=True)
    upload(gcs_bucket, tmp_path)
    assert re.search(rf"dataset is empty.*{tmp_path}", caplog.text)
    caplog.clear()
    upload(gcs_bucket, tmp_path)  # a hit
    assert "dataset is empty" not in caplog.text


@pytest.mark.parametrize(
    ("files", "options", "expected"),
    [
        ({}, {"allow_empty": False}, 1),
        ({}, {"min_files": 2}, 2),
        (FILES, {"min_files": 3}, 3),
    ],
)
@pytest.mark.parametrize("call", [upload, upload_data])
def test_fewer_files_than_asked_for_are_an_error_though_they_were_published_before(
    call, files, options, expected, tree, gcs_server, gcs_bucket
):
    root = tree(files)
    upload(gcs_bucket, root)
    gcs_server.clear_requests()
    with pytest.raises(EmptyDataError, match=rf"found {len(files)} .* {expected}.*{root}"):
        call(gcs_bucket, root, **options)
    assert gcs_server.requests == []
    assert not isinstance(EmptyDataError(), PERMANENT_ERRORS)


def test_as_many_files_as_asked_for_are_uploaded(tree, gcs_bucket):
    root = tree(FILES)
    assert upload(gcs_bucket, root, allow_empty=False, min_files=2).uploaded_files == 2
    assert upload(gcs_bucket, root / "train.csv", allow_empty=False, min_files=1).files == 1
