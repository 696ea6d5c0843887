"""`Data` behaves as keras_remote's does."""

import errno
import logging
import os

import pytest

from keras_remote_airflow import Data, make_data_ref
from keras_remote_airflow.core.disk.hashing import take_snapshot
from keras_remote_airflow.core.errors import (
    PERMANENT_ERRORS,
    DataNotFoundError,
    InvalidInputError,
)


def test_local_path_becomes_absolute(tree, monkeypatch):
    root = tree({"a.txt": "x"})
    monkeypatch.chdir(root.parent)
    assert Data("data").path == str(root)
    assert Data("./data/../data/a.txt").path == str(root / "a.txt")


def test_tilde_is_the_home_directory(tree, monkeypatch):
    root = tree({"a.txt": "x"})
    monkeypatch.setenv("HOME", str(root))
    assert Data("~/a.txt").path == str(root / "a.txt")


def test_directory_and_file_are_told_apart(tree):
    root = tree({"a.txt": "x"})
    assert Data(str(root)).is_dir is True
    assert Data(f"{root}/").is_dir is True
    assert Data(str(root / "a.txt")).is_dir is False
    assert Data(str(root)).is_gcs is False


def test_missing_path_is_a_file_not_found_error_that_names_both_spellings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="not/here") as caught:
        Data("not/here")
    assert str(tmp_path / "not/here") in str(caught.value)


def test_empty_path_is_a_value_error():
    with pytest.raises(ValueError, match="empty"):
        Data("")


@pytest.mark.parametrize(
    ("uri", "is_dir"),
    [
        ("gs://bucket/data/", True),
        ("gs://bucket/", True),
        ("gs://bucket/data/train.csv", False),
        ("gs://bucket/data", False),
        ("gs://bucket/~/../x.csv", False),
    ],
)
def test_cloud_storage_uri_is_kept_as_it_is(uri, is_dir):
    data = Data(uri)
    assert (data.path, data.is_gcs, data.is_dir) == (uri, True, is_dir)


@pytest.mark.parametrize(
    ("uri", "warns"),
    [
        ("gs://bucket/data", True),
        ("gs://bucket/v1.2/data", True),
        ("gs://bucket/data/", False),
        ("gs://bucket/data/train.csv", False),
        ("gs://bucket/", False),
    ],
)
def test_uri_that_looks_like_a_directory_without_its_slash_draws_a_warning(uri, warns, caplog):
    with caplog.at_level(logging.WARNING):
        Data(uri)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * warns
    if warns:
        assert f"{uri}/" in caplog.text


def test_content_hash_of_cloud_storage_data_is_a_value_error():
    with pytest.raises(ValueError, match="gs://bucket/data/"):
        Data("gs://bucket/data/").content_hash()


def test_content_hash_is_computed_anew_each_time(tree):
    root = tree({"a": "x"})
    data = Data(str(root))
    before = data.content_hash()
    (root / "a").write_text("y")
    assert data.content_hash() != before


def test_repr_shows_the_path_as_given(tree, monkeypatch):
    monkeypatch.chdir(tree({}).parent)
    assert repr(Data("data")) == "Data('data')"
    assert repr(Data("gs://bucket/x.csv")) == "Data('gs://bucket/x.csv')"


def test_broken_link_names_its_target(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(InvalidInputError, match="gone"):
        Data(str(tmp_path / "link"))


def test_a_ref_is_told_that_it_is_uploaded_already():
    ref = make_data_ref("gs://bucket/raw/", True)
    with pytest.raises(InvalidInputError, match=r"data ref stands for data that is uploaded.*raw/"):
        Data(ref)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [None, 7, b"bytes"])
def test_what_is_no_path_is_refused(value):
    with pytest.raises(InvalidInputError, match=repr(value)):
        Data(value)


def test_a_path_object_is_taken_as_its_path(tmp_path):
    assert Data(tmp_path).path == str(tmp_path)


class StoragePath:
    """Like Airflow's ObjectStoragePath: no path-like, with a protocol, spelled as a URI."""

    def __init__(self, uri: str) -> None:
        self.protocol = uri.partition("://")[0]
        self.uri = uri

    def __str__(self) -> str:
        return self.uri


@pytest.mark.parametrize("kind", [StoragePath, str])
def test_storage_paths_are_taken_as_what_they_stand_for(kind, tmp_path):
    assert Data(kind(f"file://{tmp_path}")).path == str(tmp_path)
    for uri in ("gs://bucket/raw/", "gs://google_default@bucket/raw/"):
        data = Data(kind(uri))
        assert (data.path, data.is_gcs, data.is_dir) == ("gs://bucket/raw/", True, True)
    with pytest.raises(InvalidInputError, match=r"s3://bucket/raw.*gs://|gs://.*s3://bucket/raw"):
        Data(kind("s3://bucket/raw"))
    with pytest.raises(InvalidInputError, match="file://server/share"):
        Data(kind("file://server/share"))


def test_none_from_an_empty_parameter_is_recognized(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataNotFoundError, match="empty"):
        Data("None")


@pytest.mark.parametrize("code", ["EIO", "ENOTCONN", "ESTALE", "ETIMEDOUT"])
@pytest.mark.parametrize("call", [Data, lambda path: take_snapshot(path)], ids=["Data", "snapshot"])
def test_a_disk_that_does_not_answer_is_an_outage_and_no_missing_path(
    code, call, tmp_path, monkeypatch
):
    number = getattr(errno, code)
    system_stat = os.stat

    def stat(path, **options):
        if path == str(tmp_path):
            raise OSError(number, os.strerror(number), path)
        return system_stat(path, **options)

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(OSError, match=str(tmp_path)) as caught:
        call(str(tmp_path))
    assert caught.value.errno == number
    assert not isinstance(caught.value, PERMANENT_ERRORS)


@pytest.mark.parametrize(
    "path", ["gs:/demo/x", "gs//demo/x", "GS://demo/x", " gs://demo", "s3://b"]
)
def test_what_looks_like_another_uri_is_told_how_to_spell_one(path):
    with pytest.raises(DataNotFoundError, match=f"^expected gs://bucket/name.*{path}"):
        Data(path)


def test_a_path_that_is_not_there_is_not_taken_for_a_uri():
    with pytest.raises(DataNotFoundError, match="/no/such/data") as caught:
        Data("/no/such/data")
    assert "gs://" not in str(caught.value)
