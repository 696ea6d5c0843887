"""What the tests of core share: trees on disk, a bucket seen from outside, a look at the writes."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from keras_remote_airflow.testing import Request, StorageServer

needs_flock = pytest.mark.skipif(not hasattr(fcntl, "flock"), reason="this system has no flock")


@pytest.fixture
def tree(tmp_path: Path) -> Callable[..., Path]:
    """`tree({"sub/a.txt": "text"}, name="data") -> Path` of a new directory that holds them."""

    def make(files: Mapping[str, str | bytes], name: str = "data") -> Path:
        root = tmp_path / name
        root.mkdir()
        for relative, content in files.items():
            path = root / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return root

    return make


@pytest.fixture
def as_another_user() -> Iterator[Path]:
    """This process acts as user 1000 until the end; the value is a directory that it may enter."""
    if os.geteuid() != 0:
        pytest.skip("only root can act as another user")
    folder = tempfile.mkdtemp()
    os.chmod(folder, 0o755)
    yield Path(folder)
    os.seteuid(0)
    shutil.rmtree(folder)


@pytest.fixture
def bucket(gcs_bucket: str) -> Iterator[Any]:
    """The test's bucket through Google's own client: a view that owes nothing to our code."""
    from google.cloud import storage

    client = storage.Client(project="test-project")
    yield client.bucket(gcs_bucket)
    client.close()


def stored(bucket: Any) -> dict[str, bytes]:
    """Return every object of the bucket."""
    return {blob.name: blob.download_as_bytes() for blob in bucket.list_blobs()}


def writes(server: StorageServer) -> list[Request]:
    """Return the requests so far that could have changed something."""
    return [request for request in server.requests if request.method != "GET"]


def written_names(server: StorageServer) -> list[str | None]:
    """Return the names of the objects stored so far, in the order of the answers."""
    return [request.object_name for request in writes(server)]


def on_disk(root: Path) -> dict[str, bytes]:
    """Return every file below `root`."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }
