"""Fidelity: the real clients cannot tell the server from Cloud Storage."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from google.api_core import exceptions
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage

from keras_remote_airflow.testing import Fault, StorageServer

NAMES = ["a", "a/b", "é ü/%2F?#&+ x", "snow ☃", "🐍/z"]
BIG = os.urandom(9 * 1024 * 1024 + 5)  # above every client's limit for single-request uploads


@pytest.fixture
def client(server: StorageServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[storage.Client]:
    for name, value in server.env().items():
        monkeypatch.setenv(name, value)
    made = storage.Client(project="p", credentials=AnonymousCredentials())
    yield made
    made.close()


class TestGoogleCloudStorage:
    def test_it_uploads_lists_and_downloads(self, client: storage.Client) -> None:
        bucket = client.bucket("demo")
        for name in NAMES:
            bucket.blob(name).upload_from_string(name.encode())
        assert [blob.name for blob in client.list_blobs("demo", page_size=2)] == sorted(NAMES)
        assert [bucket.blob(n).download_as_bytes() for n in NAMES] == [n.encode() for n in NAMES]

    @pytest.mark.parametrize("chunk_size", [None, 1024 * 1024])
    def test_large_and_empty_files_go_round(
        self, client: storage.Client, chunk_size: int | None
    ) -> None:
        for data in (b"", b"x", BIG):
            blob = client.bucket("demo").blob("x", chunk_size=chunk_size)
            blob.upload_from_string(data)
            assert blob.size == len(data)
            assert client.bucket("demo").blob("x").download_as_bytes() == data
            assert blob.download_as_bytes() == data  # in ranges, when chunk_size is set

    def test_create_only_and_missing_things_raise_its_exceptions(
        self, client: storage.Client
    ) -> None:
        blob = client.bucket("demo").blob("x")
        blob.upload_from_string(b"1", if_generation_match=0)
        with pytest.raises(exceptions.PreconditionFailed):
            blob.upload_from_string(b"2", if_generation_match=0)
        with pytest.raises(exceptions.NotFound):
            client.bucket("demo").blob("nope").download_as_bytes()
        with pytest.raises(exceptions.Conflict):
            client.create_bucket("demo")
        with pytest.raises(exceptions.Conflict):
            client.bucket("demo").delete()
        assert client.lookup_bucket("nope") is None
        assert client.bucket("demo").get_blob("nope") is None

    def test_a_declared_crc32c_is_checked(
        self, client: storage.Client, server: StorageServer
    ) -> None:
        blob = client.bucket("demo").blob("x")
        blob.crc32c = "AAAAAA=="
        with pytest.raises(exceptions.BadRequest, match="CRC32C"):
            blob.upload_from_string(b"data", checksum=None)
        assert not server.objects("demo")

    def test_corrupted_and_mislabelled_downloads_are_noticed(
        self, client: storage.Client, server: StorageServer
    ) -> None:
        server.put("demo", "x", b"data")
        for action in ("corrupt", "bad_hash"):
            server.add_fault(Fault(action=action))
            with pytest.raises(Exception, match="Checksum mismatch"):
                client.bucket("demo").blob("x").download_as_bytes()

    def test_it_retries_a_503_and_a_lost_answer(
        self, client: storage.Client, server: StorageServer
    ) -> None:
        server.add_fault(Fault(method="GET", status=503))
        server.add_fault(Fault(method="GET", action="drop_after", nth=2))
        server.put("demo", "x", b"data")
        assert client.bucket("demo").get_blob("x").size == 4

    def test_it_resumes_an_interrupted_upload(
        self, client: storage.Client, server: StorageServer
    ) -> None:
        server.add_fault(Fault(method="PUT", nth=2, action="drop_before", after_bytes=700_000))
        server.add_fault(Fault(method="PUT", nth=5, status=503))
        blob = client.bucket("demo").blob("x", chunk_size=1024 * 1024)
        blob.upload_from_string(BIG, if_generation_match=0)
        assert server.objects("demo")["x"].data == BIG

    def test_it_lists_with_delimiter_glob_and_offsets(self, client: storage.Client) -> None:
        bucket = client.bucket("demo")
        for name in ("a.csv", "d/1.csv", "d/2.txt", "d/e/3.csv", "f/4.csv"):
            bucket.blob(name).upload_from_string(b"")

        def names(**kwargs: Any) -> list[str]:
            return [blob.name for blob in client.list_blobs("demo", **kwargs)]

        listing = client.list_blobs("demo", delimiter="/")
        assert [blob.name for blob in listing] == ["a.csv"]
        assert listing.prefixes == {"d/", "f/"}
        assert names(prefix="d/", delimiter="/") == ["d/1.csv", "d/2.txt"]
        assert names(match_glob="**.csv") == ["a.csv", "d/1.csv", "d/e/3.csv", "f/4.csv"]
        assert names(match_glob="*/*.{csv,txt}") == ["d/1.csv", "d/2.txt", "f/4.csv"]
        assert names(start_offset="d/2.txt", end_offset="f/") == ["d/2.txt", "d/e/3.csv"]
        assert names(max_results=2) == ["a.csv", "d/1.csv"]
        assert names(fields="items(name),nextPageToken", page_size=1)[-1] == "f/4.csv"

    def test_it_copies_composes_renames_patches_and_batches(self, client: storage.Client) -> None:
        bucket = client.bucket("demo")
        one = bucket.blob("one")
        one.metadata = {"k": "v"}
        one.upload_from_string(b"1", content_type="text/plain")
        copy = bucket.copy_blob(one, bucket, "copy")
        assert (copy.metadata, copy.content_type) == ({"k": "v"}, "text/plain")
        both = bucket.blob("both")
        both.compose([one, copy])
        assert both.download_as_bytes() == b"11"
        renamed = bucket.rename_blob(both, "renamed")
        renamed.metadata = {"x": "y"}
        renamed.patch()
        assert bucket.get_blob("renamed").metadata == {"x": "y"}
        assert bucket.blob("again").rewrite(renamed)[0] is None
        with client.batch():
            for name in ("one", "copy", "renamed"):
                bucket.blob(name).delete()
        assert [blob.name for blob in client.list_blobs("demo")] == ["again"]

    def test_a_missing_object_in_a_batch_raises(self, client: storage.Client) -> None:
        with pytest.raises(exceptions.NotFound), client.batch():
            client.bucket("demo").blob("nope").delete()

    def test_buckets_keep_their_lifecycle_and_go(self, client: storage.Client) -> None:
        bucket = client.bucket("aged")
        bucket.add_lifecycle_delete_rule(age=30)
        client.create_bucket(bucket)
        rules = list(client.get_bucket("aged").lifecycle_rules)
        assert rules[0]["condition"] == {"age": 30}
        bucket.blob("x").upload_from_string(b"")
        bucket.delete(force=True)
        assert [found.name for found in client.list_buckets()] == ["demo"]

    def test_file_objects_stream_both_ways(self, client: storage.Client) -> None:
        blob = client.bucket("demo").blob("x", chunk_size=256 * 1024)
        with blob.open("wb") as file:
            file.write(BIG[:600_000])
        with blob.open("rb") as file:
            file.seek(300_000)
            assert file.read() == BIG[300_000:600_000]


def needs(module: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(
        importlib.util.find_spec(module) is None,
        reason=f"{module} comes with Airflow's google provider",
    )


@needs("gcloud")
class TestGcloudAio:
    @pytest.fixture(autouse=True)
    def _environment(self, server: StorageServer, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)

    @pytest.mark.parametrize("kind", ["SIMPLE", "MULTIPART", "RESUMABLE"])
    def test_it_uploads_and_downloads(self, server: StorageServer, kind: str) -> None:
        import asyncio

        from gcloud.aio.storage import Storage

        async def journey() -> None:
            async with Storage() as aio:
                for data in (b"", b"x", BIG):
                    # Without metadata it uses a simple upload, with it a multipart one.
                    metadata = None if kind == "SIMPLE" else {"metadata": {"k": "v"}}
                    await aio.upload(
                        "demo",
                        "a/ü b",
                        data,
                        metadata=metadata,
                        force_resumable_upload=True if kind == "RESUMABLE" else None,
                    )
                    assert await aio.download("demo", "a/ü b") == data
                    found = await aio.download_metadata("demo", "a/ü b")
                    assert found.get("metadata") == (metadata or {}).get("metadata")

        asyncio.run(journey())
        assert server.objects("demo")["a/ü b"].data == BIG

    def test_it_lists_copies_composes_patches_and_deletes(self, server: StorageServer) -> None:
        import asyncio

        import aiohttp
        from gcloud.aio.storage import Bucket, Storage

        async def journey() -> None:
            async with Storage() as aio:
                for name in ("a", "b/c", "b/d"):
                    await aio.upload("demo", name, name.encode())
                assert await Bucket(aio, "demo").list_blobs(prefix="b/") == ["b/c", "b/d"]
                page = await aio.list_objects("demo", params={"maxResults": "2"})
                rest = await aio.list_objects("demo", params={"pageToken": page["nextPageToken"]})
                assert [item["name"] for item in rest["items"]] == ["b/d"]
                await aio.copy("demo", "a", "demo", new_name="e")
                await aio.compose("demo", "f", ["a", "e"])
                assert await aio.download("demo", "f") == b"aa"
                await aio.patch_metadata("demo", "f", {"metadata": {"k": "v"}})
                await aio.delete("demo", "a")
                with pytest.raises(aiohttp.ClientResponseError, match="404"):
                    await aio.download("demo", "a")

        asyncio.run(journey())
        assert server.objects("demo")["f"].metadata == {"k": "v"}


GCSFS_JOURNEY = """
import os, sys
import gcsfs
url = os.environ["STORAGE_EMULATOR_HOST"]
fs = gcsfs.GCSFileSystem(token="anon", project="p", endpoint_url=url)
big = os.urandom(9 * 1024 * 1024 + 5)
fs.pipe({"demo/a/big": big, "demo/a/small": b"x\\n", "demo/a/empty": b""})
fs.pipe("demo/a b/\\u00fc#?", b"y")
assert fs.cat("demo/a/big") == big
assert fs.cat("demo/a/small") == b"x\\n"
assert fs.cat("demo/a/empty") == b""
assert fs.cat("demo/a b/\\u00fc#?") == b"y"
assert fs.ls("demo/a") == ["demo/a/big", "demo/a/empty", "demo/a/small"]
assert sorted(fs.ls("demo")) == ["demo/a", "demo/a b"]
even = big[:9 * 2**20]  # before 2026.6 it sends chunks of any size, which Cloud Storage refuses
with fs.open("demo/w", "wb", block_size=5 * 2**20) as f:
    f.write(even)
    f.write(even)
    f.write(big[9 * 2**20:])
assert fs.cat("demo/w") == even + big
assert fs.cat_file("demo/w", 5, 9) == big[5:9]
with fs.open("demo/w") as f:
    f.seek(7_000_000)
    assert f.read(3) == big[7_000_000:7_000_003]
fs.cp("demo/a/small", "demo/c")
fs.mv("demo/c", "demo/d")
fs.merge("demo/m", ["demo/a/small", "demo/d"])
assert fs.cat("demo/m") == b"x\\nx\\n"
fs.rm(["demo/a", "demo/a b"], recursive=True)
assert fs.find("demo") == ["demo/d", "demo/m", "demo/w"]
assert not fs.exists("demo/a/big")
try:
    fs.pipe_file("demo/m", b"", mode="create")
except FileExistsError:
    pass
else:
    sys.exit("an existing file was created")
fs.mkdir("made-bucket")
assert fs.exists("made-bucket")
"""


@pytest.mark.slow
@needs("gcsfs")
def test_gcsfs_makes_its_journey(server: StorageServer) -> None:
    # In a process of its own: gcsfs reads part of the environment when it is imported.
    env = {**os.environ, **server.env()}
    done = subprocess.run(
        [sys.executable, "-c", GCSFS_JOURNEY], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert all(request.status != 405 for request in server.requests)
