"""DataUploadOperator, executed in this process against a local Cloud Storage."""

import json
import logging
import os
import traceback
from datetime import timedelta
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import pytest

from keras_remote_airflow import Data, DataUploadOperator, metrics, upload_data
from keras_remote_airflow._compat import AirflowFailException, AirflowSkipException, AssetAlias
from keras_remote_airflow.core.errors import EmptyDataError, InvalidInputError, StoreError
from keras_remote_airflow.core.refs import make_data_ref

try:
    from airflow.sdk import ObjectStoragePath
except ImportError:  # Airflow 2
    if not TYPE_CHECKING:
        from airflow.io.path import ObjectStoragePath

GOLDEN = "15d41417b45aa09c0450d8955b845bb278f2990728bcc5d919d62309a2c6ebee"
REF = make_data_ref(f"gs://test-bucket/default/data-cache/{GOLDEN}", True)


class Table:
    """Compared element by element, like a table of pandas, which an XCom may hold."""

    def __eq__(self, other):
        raise ValueError("the truth value is ambiguous")

    __hash__ = None


def upload(path, **arguments):
    return DataUploadOperator(
        task_id="upload", **{"data": str(path), "bucket_name": "test-bucket"} | arguments
    )


def test_returns_the_ref_and_pushes_the_stats(execute, dataset):
    ref, xcoms = execute(upload(dataset, namespace_prefix="team/a", mount_path="/data"))
    assert ref == {
        "__data_ref__": True,
        "gcs_uri": f"gs://test-bucket/team/a/data-cache/{GOLDEN}",
        "is_dir": True,
        "mount_path": "/data",
    }
    assert type(ref) is dict
    assert list(xcoms) == ["upload_stats"]
    assert xcoms["upload_stats"]["content_hash"] == GOLDEN


def test_a_file_is_not_a_directory(execute, dataset):
    ref, _ = execute(upload(dataset / "train.csv"))
    assert ref["is_dir"] is False


def test_takes_a_data_object_too(execute, dataset):
    ref, _ = execute(upload(dataset, data=Data(str(dataset))))
    assert ref["gcs_uri"].endswith(GOLDEN)


def test_constructing_it_touches_neither_the_data_nor_the_arguments():
    arguments: dict[str, Any] = {
        "data": "/no/such/path/{{ run_id }}",
        "bucket_name": "{{ var.value.bucket }}",
        "namespace_prefix": "{{ 1 }}",
        "mount_path": "{{ 2 }}",
        "gcp_conn_id": "{{ 3 }}",
        "impersonation_chain": ("{{ 4 }}", "{{ 5 }}"),
        "user_project": "{{ 6 }}",
        "layout": "{{ 7 }}",
        "verify": "{{ 8 }}",
        "hash_index": "{{ 9 }}",
    }
    task = DataUploadOperator(task_id="upload", **arguments)
    assert {name: getattr(task, name) for name in task.template_fields} == arguments


def test_gs_data_is_looked_at_once_and_passed_on(execute, gcs_server):
    gcs_server.create_bucket("elsewhere")
    for name, content in {"raw/a": b"1", "raw/b": b"22", "rawhide": b"333"}.items():
        gcs_server.put("elsewhere", name, content)
    stats = []
    for _ in range(2):
        gcs_server.clear_requests()
        ref, xcoms = execute(upload("gs://elsewhere/raw/"))
        stats.append(xcoms["upload_stats"])
        assert len(gcs_server.requests) == 1
        gcs_server.put("elsewhere", "raw/b", b"2!")
    assert (ref["gcs_uri"], ref["is_dir"]) == ("gs://elsewhere/raw/", True)
    assert {stats[0][name] for name in ("content_hash", "cache_hit")} == {None, False}
    assert (stats[0]["files"], stats[0]["bytes"]) == (2, 3)
    assert len(stats[0]["fingerprint"]) == 64
    assert stats[0]["fingerprint"] != stats[1]["fingerprint"]


@pytest.mark.parametrize(
    ("uri", "min_files", "words"),
    [
        ("gs://test-bucket/nothing/", 0, "found no objects at gs://test-bucket/nothing/"),
        ("gs://test-bucket/nothing", 0, "found no objects at gs://test-bucket/nothing"),
        ("gs://test-bucket/raw/", 3, "found 1 file on Cloud Storage, expected at least 3"),
    ],
)
def test_gs_data_that_is_not_there_is_left_to_retries(execute, gcs_server, uri, min_files, words):
    gcs_server.put("test-bucket", "raw/a", b"1")
    with pytest.raises(EmptyDataError, match=words):
        execute(upload(uri, allow_empty=True, min_files=min_files))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"data": "/no/such/path"}, "/no/such/path"),
        ({"data": ""}, "data must not be empty"),
        ({"data": "None"}, "data must not be empty"),
        ({"data": None}, "data must not be empty"),
        ({"bucket_name": "None"}, "bucket_name must not be empty"),
        ({"namespace_prefix": ""}, "namespace_prefix must not be empty"),
        ({"namespace_prefix": 1.1}, "namespace_prefix is a float, expected text: 1.1"),
        ({"data": Table()}, "data is a Table, expected text"),
        ({"data": REF}, f"data is a data ref: it is uploaded already.*{REF['gcs_uri']}"),
        ({"data": json.dumps(REF)}, "data is a data ref: it is uploaded already"),
        ({"bucket_name": repr(REF)}, "bucket_name is a data ref: pass one of its fields"),
        (
            {"namespace_prefix": "é" * 300, "outlets": [AssetAlias("new")]},
            "asset URI too long: 1[0-9]{3} characters",
        ),
        ({"bucket_name": "gs://test-bucket"}, "gs://test-bucket"),
        ({"namespace_prefix": "/"}, "namespace_prefix '/'"),
        ({"layout": "kinetik"}, "kinetik"),
        ({"verify": "some"}, "unknown verify 'some'"),
    ],
)
def test_bad_input_fails_for_good(execute, gcs_server, dataset, arguments, words):
    with pytest.raises(AirflowFailException, match=words) as caught:
        execute(upload(dataset, **arguments))
    assert "".join(traceback.format_exception(caught.value)).count("Traceback (") == 1
    assert gcs_server.objects("test-bucket") == {}


@pytest.mark.parametrize(
    ("argument", "value", "words"),
    [
        ("data", ["/a", "/b"], r"data is a list of 2.*\.expand\(data="),
        ("data", {"/a", "/b"}, r"data is a set of 2.*\.expand\(data="),
        ("namespace_prefix", ("a", "b"), r"tuple of 2.*\.expand\(namespace_prefix="),
        ("data", ObjectStoragePath("s3://bucket/data/"), "data on s3://"),
        ("min_files", "3", "min_files '3': expected a bool and an int"),
        ("min_files", True, "min_files True: expected a bool and an int"),
        ("min_files", -3, "min_files -3: expected a bool and an int of 0 or more"),
        ("allow_empty", "{{ params.empty }}", "expected a bool and an int"),
        ("on_cache_hit", "stop", "unknown on_cache_hit 'stop'"),
    ],
)
def test_what_cannot_work_is_said_when_the_dag_is_parsed(argument, value, words):
    with pytest.raises(InvalidInputError, match=rf"{words}.*\(DataUploadOperator task 'upload'\)"):
        upload("/data", **{argument: value})


def test_kinetic_gets_no_mount_path(execute, dataset, gcs_server):
    with pytest.raises(InvalidInputError, match=r"without downloading.*'/data'.*task 'upload'"):
        upload("/data", layout="kinetic", mount_path="/data")
    task = upload(dataset, layout="{{ params.layout }}", mount_path="/data")
    task.layout = "kinetic"  # what the template rendered
    with pytest.raises(AirflowFailException, match="without downloading"):
        execute(task)
    assert gcs_server.requests == []
    task.mount_path = "None"
    assert execute(task)[0]["mount_path"] is None


@pytest.mark.parametrize("make", [Path, lambda path: ObjectStoragePath(f"file://{path}")])
def test_paths_become_text_in_template_fields(execute, dataset, make):
    """Airflow 3 calls `resolve` of a path there, or refuses one that the parser does not have."""
    task = upload(make(dataset), data=make(dataset), mount_path=PurePosixPath("/data"))
    assert (task.data, task.mount_path) == (str(dataset), "/data")
    assert execute(task)[0]["gcs_uri"].endswith(GOLDEN)


def test_what_templates_render_of_nothing_and_of_digits_is_understood(execute, dataset, tmp_path):
    task = upload(
        dataset, namespace_prefix=20260131, mount_path="None", user_project="", hash_index="None"
    )
    ref, _ = execute(task)
    assert ref["gcs_uri"] == f"gs://test-bucket/20260131/data-cache/{GOLDEN}"
    assert ref["mount_path"] is None


@pytest.mark.parametrize(
    ("arguments", "expected"), [({}, 1), ({"min_files": 3, "allow_empty": True}, 3)]
)
def test_too_few_files_are_left_to_retries_because_mounts_come_back(
    execute, gcs_server, tmp_path, arguments, expected
):
    upload_data("test-bucket", str(tmp_path))  # that it is published makes no difference
    gcs_server.clear_requests()
    with pytest.raises(EmptyDataError, match=f"found 0 files, expected at least {expected}"):
        execute(upload(tmp_path, **arguments))
    assert gcs_server.requests == []
    execute(upload(tmp_path, allow_empty=True))


def test_a_refusal_is_left_to_the_tasks_retries(execute, gcs_server, dataset):
    gcs_server.deny("create")
    with pytest.raises(StoreError, match="objectCreator"):
        execute(upload(dataset))


def test_on_kill_does_nothing_while_nothing_is_transferred(dataset):
    upload(dataset).on_kill()


def test_a_hit_that_skips_has_pushed_all_that_one_that_continues_pushes(execute, dataset):
    ref, _ = execute(upload(dataset))
    with pytest.raises(AirflowSkipException, match="nothing new"):
        execute(upload(dataset, on_cache_hit="skip"), xcoms := {})
    stats = xcoms.pop("upload_stats")
    assert (stats["cache_hit"], stats["content_hash"]) == (True, GOLDEN)
    assert xcoms == ref | {"return_value": ref}


def test_a_miss_does_not_skip(execute, dataset):
    ref, _ = execute(upload(dataset, on_cache_hit="skip"))
    assert ref["gcs_uri"].endswith(GOLDEN)


def test_dry_run_says_what_would_be_uploaded_and_writes_nothing(gcs_server, dataset, caplog):
    caplog.set_level(logging.INFO)
    upload(dataset).dry_run()
    assert "Would upload 2 of 2 files (2 B of 2 B)" in caplog.text
    assert f"data-cache/{GOLDEN}\n" in caplog.text
    assert gcs_server.objects("test-bucket") == {}
    upload_data("test-bucket", str(dataset))
    upload(dataset).dry_run()
    assert "Would upload 0 of 2 files" in caplog.text


def test_verify_full_sees_what_is_missing_beyond_the_first_page(execute, gcs_server, tmp_path):
    for number in range(1001):
        (tmp_path / f"{number:04}").touch()
    uri = upload_data("test-bucket", str(tmp_path))
    gcs_server.delete("test-bucket", f"{uri.removeprefix('gs://test-bucket/')}/1000")
    _, first = execute(upload(tmp_path))
    assert first["upload_stats"]["cache_hit"] is True
    _, second = execute(upload(tmp_path, verify="full"))
    assert (second["upload_stats"]["cache_hit"], second["upload_stats"]["uploaded_files"]) == (
        False,
        1,
    )


def test_hash_index_is_kept_where_it_is_told(execute, dataset, tmp_path):
    for path in (dataset / "train.csv", dataset / "sub" / "eval.csv"):
        os.utime(path, (1, 1))  # long enough ago to be recorded
    execute(upload(dataset, hash_index=str(tmp_path / "index")))
    assert (tmp_path / "index").stat().st_size > 0


class RecordingStats:
    """The two calls that we make of Airflow's Stats."""

    def __init__(self):
        self.counted = {}
        self.tags = []

    def incr(self, stat, count=1, *, tags=None):
        self.counted[stat] = self.counted.get(stat, 0) + count
        self.tags.append(tags)

    def timing(self, stat, dt, *, tags=None):
        assert isinstance(dt, timedelta)
        assert dt.total_seconds() > 0
        self.counted[stat] = self.counted.get(stat, 0) + 1
        self.tags.append(tags)


def test_hits_misses_files_bytes_and_durations_are_counted(execute, dataset, monkeypatch):
    monkeypatch.setattr(metrics, "Stats", stats := RecordingStats())
    for data in (dataset, dataset, f"gs://test-bucket/default/data-cache/{GOLDEN}/"):
        execute(upload(data))
    assert stats.counted == {
        "keras_remote.upload.misses": 1,
        "keras_remote.upload.hits": 1,
        "keras_remote.upload.files": 2,
        "keras_remote.upload.bytes": 2,
        "keras_remote.upload.duration": 2,
    }
    assert all(tags["task_id"] == "upload" and "dag_id" in tags for tags in stats.tags)
