"""Who competes, and how each does it: written as its own documentation would have it.

A contender prepares itself (imports, client) and returns its actions:

    hash         the content hash of the data
    upload       a miss: the bucket is empty (ours and kinetic hash first, and write a marker last)
    hit          the same call again, nothing changed
    index        as hit, writing a stat index (ours only, not reported)
    unchanged    as hit, with the stat index that `index` wrote; kinetic has none and hits again
    materialize  download what `upload` returned into an empty folder
    plan         everything an upload of new data does except sending it (ours only)
    plan+index   the same, and writing a hash index (ours only)
    package      import the package (ours only)
    operator     import the operator where Airflow's BaseOperator is imported (ours only)
"""

import asyncio
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

BUCKET = "bench"
PROJECT = "bench"
PREFIX = "data"
# google-cloud-storage's default, and kinetic's.
THREADS = 8
# What obstore reached its best with.
IN_FLIGHT = 64


@dataclass(frozen=True)
class Job:
    """What a worker is to do.

    Attributes:
        contender: a key of CONTENDERS.
        action: one of the actions above.
        path: the data; "" where there is none.
        is_dir: whether it is a folder.
        uri: what the contender's upload returned, for `materialize`.
        scratch: a folder that is this contender's own for as long as its server lives.
    """

    contender: str
    action: str
    path: str
    is_dir: bool
    uri: str
    scratch: str


Actions = dict[str, Callable[[], Any]]


def _pairs(job: Job) -> list[tuple[str, str]]:
    """Local paths and object names."""
    if not job.is_dir:
        return [(job.path, f"{PREFIX}/{os.path.basename(job.path)}")]
    found = []
    for folder, _, names in os.walk(job.path):
        for name in names:
            path = os.path.join(folder, name)
            found.append((path, f"{PREFIX}/{os.path.relpath(path, job.path)}"))
    return found


def ours(job: Job) -> Actions:
    if job.action == "package":
        return {"package": _import_package}
    if job.action == "operator":
        from airflow.sdk import BaseOperator  # noqa: F401

        return {"operator": _import_operator}

    from google.cloud import storage

    from keras_remote_airflow import Data, make_data_ref, materialize

    # A first import is no part of what is measured.
    from keras_remote_airflow.core.cloud import gcs  # noqa: F401
    from keras_remote_airflow.core.datasets import upload as uploading
    from keras_remote_airflow.core.disk import hashing, index  # noqa: F401

    client = storage.Client(project=PROJECT)
    indexed = {"hash_index": os.path.join(job.scratch, "index")}

    def upload(**options: Any) -> str:
        return uploading.upload_data(BUCKET, Data(job.path), client=client, **options)

    def fetch() -> None:
        ref = make_data_ref(job.uri, job.is_dir)
        materialize(ref, os.path.join(job.scratch, "out"), client=client)

    def plan(**options: Any) -> str:
        uploading.open_bucket = _open_insatiable  # type: ignore[assignment,attr-defined]
        return upload(**options)

    return {
        "hash": lambda: Data(job.path).content_hash(),
        "upload": upload,
        "hit": upload,
        "index": lambda: upload(**indexed),
        "unchanged": lambda: upload(**indexed),
        "materialize": fetch,
        "plan": plan,
        "plan+index": lambda: plan(**indexed),
    }


def _import_package() -> None:
    import keras_remote_airflow  # noqa: F401


def _import_operator() -> None:
    from keras_remote_airflow import DataUploadOperator  # noqa: F401


class _Insatiable:
    """A store that is empty and takes everything at once."""

    bucket = BUCKET

    def read(self, name: str) -> None:
        return None

    def list_page(self, prefix: str, token: str | None = None) -> Any:
        from keras_remote_airflow.core.cloud.store import Page

        return Page([], None)

    def create(self, name: str, content: bytes) -> bool:
        return True

    def upload(self, uploads: Any, done: Callable[[Any, bool], None], _moved: Any) -> None:
        for upload in uploads:
            done(upload, True)


@contextmanager
def _open_insatiable(*_: Any, **__: Any) -> Iterator[_Insatiable]:
    yield _Insatiable()


def kinetic(job: Job) -> Actions:
    from google.cloud import storage as google_storage
    from kinetic.data import Data
    from kinetic.runner import remote_runner
    from kinetic.utils import storage

    storage._get_client(PROJECT)
    client = google_storage.Client(project=PROJECT)

    def upload() -> str:
        return storage.upload_data(BUCKET, Data(job.path), PROJECT)

    def fetch() -> None:
        ref = {"__data_ref__": True, "uri": job.uri, "is_dir": job.is_dir, "mount_path": None}
        remote_runner._download_data(ref, os.path.join(job.scratch, "out"), client)

    return {
        "hash": lambda: Data(job.path).content_hash(),
        "upload": upload,
        "hit": upload,
        "unchanged": upload,
        "materialize": fetch,
    }


def plain_loop(job: Job) -> Actions:
    from google.cloud import storage

    bucket = storage.Client(project=PROJECT).bucket(BUCKET)

    def upload() -> None:
        for path, name in _pairs(job):
            bucket.blob(name).upload_from_filename(path)

    return {"upload": upload}


def transfer_manager(job: Job) -> Actions:
    from google.cloud import storage
    from google.cloud.storage import transfer_manager as manager

    bucket = storage.Client(project=PROJECT).bucket(BUCKET)

    def upload() -> None:
        if not job.is_dir:
            [(path, name)] = _pairs(job)
            # Its way with one large file: an XML API multipart upload, which the local server does
            # not speak. What is left of it is this.
            manager.upload_many([(path, bucket.blob(name))], raise_exception=True)
            return
        names = [os.path.relpath(path, job.path) for path, _ in _pairs(job)]
        manager.upload_many_from_filenames(
            bucket,
            names,
            source_directory=job.path,
            blob_name_prefix=f"{PREFIX}/",
            worker_type=manager.THREAD,
            max_workers=THREADS,
            raise_exception=True,
        )

    return {"upload": upload}


def gcsfs(job: Job) -> Actions:
    from gcsfs import GCSFileSystem

    fs = GCSFileSystem(project=PROJECT, token="anon", endpoint_url=_endpoint())

    def upload() -> None:
        if job.is_dir:
            fs.put(job.path + "/", f"{BUCKET}/{PREFIX}/", recursive=True)
        else:
            fs.put_file(job.path, f"{BUCKET}/{PREFIX}/{os.path.basename(job.path)}")

    return {"upload": upload}


def airflow_operator(job: Job) -> Actions:
    from airflow.providers.google.cloud.hooks.gcs import GCSHook
    from airflow.providers.google.cloud.transfers.local_to_gcs import (
        LocalFilesystemToGCSOperator,
    )

    GCSHook().get_conn()  # no request; the first one imports half of Airflow

    def upload() -> None:
        # One operator for a whole folder would flatten it.
        for path, name in _pairs(job):
            LocalFilesystemToGCSOperator(
                task_id="upload", src=path, dst=name, bucket=BUCKET
            ).execute({})

    return {"upload": upload}


def obstore(job: Job) -> Actions:
    import obstore as library
    from obstore.store import GCSStore

    # A key that signs nothing. `skip_signature` is not enough: writes would still ask the machine's
    # metadata service for a token.
    nobody = {
        "gcs_base_url": _endpoint(),
        "disable_oauth": True,
        "client_email": "",
        "private_key": "",
        "private_key_id": "",
    }
    store = GCSStore(
        BUCKET,
        config={"service_account_key": json.dumps(nobody)},
        client_options={"allow_http": True},
    )

    async def upload() -> None:
        waiting = iter(_pairs(job))

        async def work() -> None:
            for path, name in waiting:
                # The local server takes an object whole, not in the XML API's parts.
                with open(path, "rb") as file:  # noqa: ASYNC230
                    await library.put_async(store, name, file, use_multipart=False)

        await asyncio.gather(*(work() for _ in range(IN_FLIGHT)))

    return {"upload": lambda: asyncio.run(upload())}


def _endpoint() -> str:
    return os.environ["STORAGE_EMULATOR_HOST"]


CONTENDERS: dict[str, Callable[[Job], Actions]] = {
    "ours": ours,
    "kinetic": kinetic,
    "plain loop": plain_loop,
    "transfer_manager": transfer_manager,
    "gcsfs": gcsfs,
    "Airflow operator": airflow_operator,
    "obstore": obstore,
}
