"""A bucket on real Cloud Storage, or the local server as its stand-in.

    KERAS_REMOTE_TEST_BUCKET=gs://BUCKET make test-cloud

Every test writes below a prefix of its own, `test-<random>/`, and deletes that at the
end. The credentials are the application default ones; they need `roles/storage.objectUser` on the
bucket (uploads themselves need less, but these tests take objects away again). The variable
KERAS_REMOTE_TEST_USER_PROJECT names the project to bill where the requester pays.

The same tests run against the local server first, in every run of the suite, so that they are in
order when there is a bucket for them. Without KERAS_REMOTE_TEST_BUCKET they run there alone, and
one skipped test says so.
"""

import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

_VARIABLE = "KERAS_REMOTE_TEST_BUCKET"
_PLACES = ["local_server", *(["real_bucket"] if os.environ.get(_VARIABLE) else [])]


@dataclass(frozen=True)
class Place:
    """Where a test may write.

    Attributes:
        bucket: its name.
        namespace: a prefix that nothing else uses, without a slash at its end.
        user_project: the project that pays for the requests, if not the bucket's own.
        view: the bucket through Google's own client.
    """

    bucket: str
    namespace: str
    user_project: str | None
    view: Any

    def objects(self) -> dict[str, bytes]:
        """Return every object below the namespace, by its name in the bucket."""
        blobs = self.view.list_blobs(prefix=f"{self.namespace}/")
        return {blob.name: blob.download_as_bytes() for blob in blobs}


@pytest.fixture(params=_PLACES)
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    from google.cloud import storage

    if request.param == "local_server":
        name, user_project = request.getfixturevalue("gcs_bucket"), None
    else:
        name = os.environ[_VARIABLE].removeprefix("gs://").rstrip("/")
        user_project = os.environ.get("KERAS_REMOTE_TEST_USER_PROJECT")
    client = storage.Client(project=os.environ.get("GOOGLE_CLOUD_PROJECT", "test-project"))
    # Short, since some names of the contract leave room for little in front of them.
    namespace = f"test-{uuid.uuid4().hex[:12]}"
    place = Place(name, namespace, user_project, client.bucket(name, user_project=user_project))
    yield place
    for blob in place.view.list_blobs(prefix=f"{namespace}/"):
        blob.delete()
    client.close()
