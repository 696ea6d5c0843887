"""`upload(dry_run=True)`: says what an upload would send, and sends nothing."""

import re

import pytest

from keras_remote_airflow.core.datasets.lookup import find
from keras_remote_airflow.core.datasets.upload import upload

from .conftest import stored

FILES = {"train.csv": "train", "sub/eval.csv": "e"}


@pytest.mark.parametrize("left_over", [[], ["train.csv"]])
def test_dry_run_counts_what_is_missing_and_writes_nothing(tree, bucket, gcs_server, left_over):
    path = str(tree(FILES))
    whole = upload(bucket.name, path, dry_run=True)
    for name in left_over:  # as an upload that died leaves it
        prefix = whole.gcs_uri.removeprefix(f"gs://{bucket.name}/")
        gcs_server.put(bucket.name, f"{prefix}/{name}", FILES[name].encode())
    before = stored(bucket)

    result = upload(bucket.name, path, dry_run=True)

    missing = [content for name, content in FILES.items() if name not in left_over]
    assert (result.uploaded_files, result.uploaded_bytes) == (len(missing), len("".join(missing)))
    assert (result.cache_hit, result.files, result.bytes) == (False, 2, 6)
    assert stored(bucket) == before
    real = upload(bucket.name, path)
    assert real.uploaded_files == result.uploaded_files
    assert real.gcs_uri == result.gcs_uri


def test_dry_run_of_published_data_is_a_hit(tree, bucket, caplog):
    path = str(tree(FILES))
    upload(bucket.name, path)
    caplog.set_level("INFO")
    result = upload(bucket.name, path, dry_run=True)
    assert (result.cache_hit, result.uploaded_files) == (True, 0)
    assert "Would upload 0" in caplog.text


def test_a_hit_says_when_the_data_was_published(tree, bucket):
    path = str(tree(FILES))
    miss = upload(bucket.name, path)
    hit = upload(bucket.name, path)
    assert miss.published_at is None
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", hit.published_at)
    assert find(bucket.name, hit.content_hash).published_at == hit.published_at
