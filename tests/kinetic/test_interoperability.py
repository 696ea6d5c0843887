"""keras-kinetic and this package share one cache: each hits what the other uploaded.

Needs keras-kinetic, and no Airflow: `make test-kinetic`.
"""

import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("kinetic", reason="keras-kinetic has an environment of its own")

from google.cloud import storage
from kinetic.data import Data as KineticData
from kinetic.data import is_data_ref as kinetic_is_data_ref
from kinetic.data import make_data_ref as kinetic_make_data_ref
from kinetic.runner.remote_runner import resolve_data_refs
from kinetic.utils import storage as kinetic_storage

from keras_remote_airflow import Data, is_data_ref, make_data_ref, materialize
from keras_remote_airflow.core.datasets.lookup import find
from keras_remote_airflow.core.datasets.upload import upload
from keras_remote_airflow.core.layout import KINETIC
from keras_remote_airflow.core.refs import DataRef, parse_data_ref
from keras_remote_airflow.testing import StorageServer

TREES: dict[str, dict[str, bytes]] = {
    "nested": {"train.csv": b"t", "sub/eval.csv": b"e"},
    "names": {"é": b"1", "a b/c#d?.txt": b"2", "B": b"3", "a-1": b"4", "a/b": b"5", "a.txt": b"6"},
    "many": {f"{n % 7}/{n}.bin": bytes([n]) * n for n in range(60)},
    "large": {"weights.bin": os.urandom(9 * 1024 * 1024 + 1), "empty": b""},
}


@pytest.fixture(autouse=True)
def _fresh_kinetic_client(monkeypatch: pytest.MonkeyPatch) -> None:
    # kinetic keeps its clients for the life of the process, and with them this test's server.
    monkeypatch.setattr(kinetic_storage, "_cached_clients", {})
    monkeypatch.setenv("KINETIC_PROJECT", "test-project")
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "test-project")


@pytest.fixture
def client(gcs_bucket: str) -> Iterator[Any]:
    client = storage.Client(project="test-project")
    yield client
    client.close()


@pytest.fixture
def tree(tmp_path: Path) -> Callable[..., Path]:
    def make(files: Mapping[str, bytes]) -> Path:
        return write_tree(tmp_path / "data", files)

    return make


def write_tree(root: Path, files: Mapping[str, bytes]) -> Path:
    root.mkdir(exist_ok=True)
    for relative, content in files.items():
        path = root / relative
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def on_disk(root: str | Path) -> dict[str, bytes]:
    paths = [path for path in Path(root).rglob("*") if path.is_file()]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}


def writes(server: StorageServer) -> list[str | None]:
    return [r.object_name for r in server.requests if r.method != "GET"]


def resolve(ref: dict[str, Any], client: Any, folder: Path) -> str:
    """Return what a function run by kinetic gets in place of the ref."""
    (path,), keywords = resolve_data_refs((ref,), {"nested": [ref]}, client, str(folder))
    assert keywords == {"nested": [path]}
    return str(path)


def test_no_airflow_is_here_and_none_is_missed():
    assert importlib.util.find_spec("airflow") is None
    assert not [name for name in sys.modules if name.partition(".")[0] == "airflow"]


@pytest.mark.parametrize("files", TREES.values(), ids=TREES)
def test_both_compute_one_hash(tree, files):
    root = tree(files)
    assert Data(str(root)).content_hash() == KineticData(str(root)).content_hash()
    for name in files:
        path = str(root / name)
        assert Data(path).content_hash() == KineticData(path).content_hash()


_NAME = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="/"), min_size=1, max_size=8
).filter(lambda name: name not in (".", ".."))


@given(
    st.dictionaries(
        st.lists(_NAME, min_size=1, max_size=3).map("/".join), st.binary(max_size=30), max_size=30
    )
)
@settings(max_examples=100, deadline=None)
def test_both_compute_one_hash_on_any_tree(files):
    with tempfile.TemporaryDirectory() as folder:
        for relative, content in files.items():
            path = Path(folder, relative)
            # "a" and "a/b" cannot both be files: the first one stays.
            if any(parent.is_file() for parent in path.parents) or path.is_dir():
                continue
            write_tree(Path(folder), {relative: content})
        assert Data(folder).content_hash() == KineticData(folder).content_hash()


def test_both_leave_linked_directories_out_and_read_linked_files(tree, tmp_path):
    root = tree(TREES["nested"])
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x").write_text("x")
    (root / "linked").symlink_to(tmp_path / "outside")
    (root / "sub" / "link.csv").symlink_to(tmp_path / "outside" / "x")
    assert Data(str(root)).content_hash() == KineticData(str(root)).content_hash()


@pytest.mark.parametrize("files", TREES.values(), ids=TREES)
def test_kinetic_hits_a_directory_that_we_uploaded(tree, gcs_server, gcs_bucket, files):
    root = str(tree(files))
    ours = upload(gcs_bucket, root, layout="kinetic")
    before = len(writes(gcs_server))
    assert kinetic_storage.upload_data(gcs_bucket, KineticData(root)) == ours.gcs_uri
    assert len(writes(gcs_server)) == before


@pytest.mark.parametrize("files", TREES.values(), ids=TREES)
def test_we_hit_a_directory_that_kinetic_uploaded(tree, gcs_server, gcs_bucket, files):
    root = str(tree(files))
    theirs = kinetic_storage.upload_data(gcs_bucket, KineticData(root))
    before = len(writes(gcs_server))
    ours = upload(gcs_bucket, root, layout="kinetic", verify="full")
    assert (ours.cache_hit, ours.gcs_uri) == (True, theirs)
    entry = find(gcs_bucket, ours.content_hash, layout="kinetic")
    assert (entry.gcs_uri, entry.is_dir) == (theirs, None)
    assert len(writes(gcs_server)) == before


def test_single_files_are_shared_in_both_directions(tree, gcs_server, gcs_bucket):
    root = tree({"ours.json": b"1", "theirs.json": b"2"})
    uri = upload(gcs_bucket, str(root / "ours.json"), layout="kinetic").gcs_uri
    before = len(writes(gcs_server))
    assert kinetic_storage.upload_data(gcs_bucket, KineticData(str(root / "ours.json"))) == uri
    assert len(writes(gcs_server)) == before
    uri = kinetic_storage.upload_data(gcs_bucket, KineticData(str(root / "theirs.json")))
    before = len(writes(gcs_server))
    ours = upload(gcs_bucket, str(root / "theirs.json"), layout="kinetic")
    assert (ours.cache_hit, ours.gcs_uri) == (True, uri)
    assert len(writes(gcs_server)) == before


@pytest.mark.parametrize("ours_first", [True, False])
def test_empty_directory_is_shared_in_both_directions(tree, gcs_server, gcs_bucket, ours_first):
    root = str(tree({}))

    def theirs() -> str:
        return str(kinetic_storage.upload_data(gcs_bucket, KineticData(root)))

    def ours() -> str:
        return upload(gcs_bucket, root, layout="kinetic").gcs_uri

    first, second = (ours, theirs) if ours_first else (theirs, ours)
    uri = first()
    before = len(writes(gcs_server))
    assert second() == uri
    assert len(writes(gcs_server)) == before
    assert find(gcs_bucket, uri.rpartition("/")[2], layout="kinetic")


def test_what_kinetic_left_half_done_we_complete(tree, gcs_server, gcs_bucket):
    root = str(tree(TREES["many"]))
    uri = kinetic_storage.upload_data(gcs_bucket, KineticData(root))
    digest = uri.rpartition("/")[2]
    gcs_server.delete(gcs_bucket, f"default/data-markers/{digest}")
    gcs_server.delete(gcs_bucket, f"default/data-cache/{digest}/3/3.bin")
    gcs_server.clear_requests()
    ours = upload(gcs_bucket, root, layout="kinetic")
    assert (ours.cache_hit, ours.uploaded_files) == (False, 1)
    assert writes(gcs_server) == [
        f"default/data-cache/{digest}/3/3.bin",
        f"default/data-markers/{digest}",
    ]


def test_marker_of_the_default_layout_is_no_hit_for_kinetic(tree, gcs_bucket, gcs_server):
    root = str(tree(TREES["nested"]))
    ours = upload(gcs_bucket, root)
    assert find(gcs_bucket, ours.content_hash, layout="kinetic") is None
    assert upload(gcs_bucket, root, layout="kinetic").uploaded_files == 0
    before = len(writes(gcs_server))
    assert kinetic_storage.upload_data(gcs_bucket, KineticData(root)) == ours.gcs_uri
    assert len(writes(gcs_server)) == before


@pytest.mark.parametrize("files", TREES.values(), ids=TREES)
def test_kinetics_runner_resolves_our_directory_refs(tree, gcs_bucket, client, tmp_path, files):
    uri = upload(gcs_bucket, str(tree(files)), layout="kinetic").gcs_uri
    ref = DataRef(uri, True, None, KINETIC).to_dict()
    path = resolve(json.loads(json.dumps(ref)), client, tmp_path / "pod")
    assert path == str(tmp_path / "pod" / "0")
    assert on_disk(path) == files


def test_kinetics_runner_resolves_our_file_refs(tree, gcs_bucket, client, tmp_path):
    file = tree({"config.json": b'{"a":1}'}) / "config.json"
    uri = upload(gcs_bucket, str(file), layout="kinetic").gcs_uri
    ref = DataRef(uri, False, None, KINETIC).to_dict()
    path = resolve(ref, client, tmp_path / "pod")
    assert path == str(tmp_path / "pod" / "0" / "config.json")
    assert Path(path).read_bytes() == b'{"a":1}'


def test_kinetics_runner_leaves_our_mounted_refs_to_the_mount(tree, gcs_bucket, client, tmp_path):
    uri = upload(gcs_bucket, str(tree(TREES["nested"])), layout="kinetic").gcs_uri
    ref = DataRef(uri, True, "/mnt/data", KINETIC).to_dict()
    assert resolve(ref, client, tmp_path / "pod") == "/mnt/data"


def test_refs_are_refs_on_both_sides():
    ours = DataRef("gs://bucket/x", True, None, KINETIC).to_dict()
    theirs = kinetic_make_data_ref("gs://bucket/x", True)
    assert kinetic_is_data_ref(ours)
    assert kinetic_is_data_ref(make_data_ref("gs://bucket/x", True))
    assert is_data_ref(theirs)
    assert {**theirs, "gcs_uri": theirs["uri"]} == ours
    assert parse_data_ref(theirs) == parse_data_ref(ours)


@pytest.mark.parametrize("is_dir", [True, False])
def test_we_materialize_what_kinetic_uploaded_by_its_own_ref(tree, gcs_bucket, tmp_path, is_dir):
    files = TREES["names"] if is_dir else {"B": b"3"}
    root = tree(TREES["names"])
    data = KineticData(str(root if is_dir else root / "B"))
    ref = kinetic_make_data_ref(kinetic_storage.upload_data(gcs_bucket, data), data.is_dir)
    materialize(ref, str(tmp_path / "out"))
    assert on_disk(tmp_path / "out") == files
