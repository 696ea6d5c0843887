"""A dataset's life on real Cloud Storage: miss, hit, read back, heal, conflict, names."""

import os
from pathlib import Path

import pytest

from keras_remote_airflow import Data, make_data_ref, materialize
from keras_remote_airflow.core.datasets.lookup import find
from keras_remote_airflow.core.datasets.upload import UploadResult, upload
from keras_remote_airflow.core.errors import ConflictError
from keras_remote_airflow.core.layout import LayoutName

from .conftest import Place

FILES = {
    "train.csv": b"t",
    "sub/eval.csv": b"e",
    "empty": b"",
    "more than one request.bin": os.urandom((9 << 20) + 17),
    # Names that some layer between us and the object could mistake for something else.
    "with space, plus+and&amp.csv": b"1",
    "per%2Fcent": b"2",
    "question?mark#hash;semi=colon": b"3",
    "quote'and\"double\\back": b"4",
    "e\u0301 (decomposed)": b"5",
    "\u00e9 (composed)": b"6",
    "日本語/😀": b"7",
    "-leading-dash": b"8",
    "x" * 200: b"9",
}


@pytest.mark.skipif(
    not os.environ.get("KERAS_REMOTE_TEST_BUCKET"),
    reason="needs a real bucket: KERAS_REMOTE_TEST_BUCKET=gs://BUCKET make test-cloud",
)
def test_the_tests_of_this_folder_know_a_real_bucket(place):
    assert place.bucket


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    for name, content in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def publish(place: Place, tree: Path, layout: LayoutName = "keras_remote") -> UploadResult:
    return upload(
        place.bucket,
        Data(str(tree)),
        namespace_prefix=place.namespace,
        layout=layout,
        user_project=place.user_project,
    )


def read_back(place: Place, uri: str, dest: Path) -> dict[str, bytes]:
    root = Path(
        materialize(make_data_ref(uri, is_dir=True), str(dest), user_project=place.user_project)
    )
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


@pytest.mark.parametrize("layout", ["keras_remote", "kinetic"])
def test_a_dataset_is_sent_once_and_comes_back_whole(place, tree, tmp_path, layout):
    first = publish(place, tree, layout)
    assert (first.cache_hit, first.uploaded_files) == (False, len(FILES))
    again = publish(place, tree, layout)
    assert (again.cache_hit, again.uploaded_files, again.gcs_uri) == (True, 0, first.gcs_uri)
    assert read_back(place, first.gcs_uri, tmp_path / "copy") == FILES


def test_a_dataset_that_lost_an_object_is_a_miss_and_healed(place, tree, tmp_path):
    uri = publish(place, tree).gcs_uri
    place.view.blob(f"{uri.removeprefix(f'gs://{place.bucket}/')}/train.csv").delete()
    content_hash = Data(str(tree)).content_hash()
    where = {"namespace_prefix": place.namespace, "user_project": place.user_project}
    assert find(place.bucket, content_hash, **where) is None
    assert publish(place, tree).uploaded_files == 1
    assert find(place.bucket, content_hash, **where).files == len(FILES)
    assert read_back(place, uri, tmp_path / "copy") == FILES


def test_other_bytes_in_a_datasets_place_are_never_overwritten(place, tree):
    content_hash = Data(str(tree)).content_hash()
    taken = f"{place.namespace}/data-cache/{content_hash}/train.csv"
    place.view.blob(taken).upload_from_string(b"other")
    with pytest.raises(ConflictError):
        publish(place, tree)
    assert place.objects()[taken] == b"other"
    assert not [name for name in place.objects() if name.endswith(".cache_marker")]
