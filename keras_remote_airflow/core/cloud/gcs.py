"""Objects in one bucket through Cloud Storage's JSON API; see `core.cloud.store`.

Nothing here overwrites or deletes: every write is create-only (`ifGenerationMatch=0`) and declares
the CRC32C that was taken when the data was hashed, so Cloud Storage refuses bytes that are not the
hashed ones. On "Precondition failed" (412), size and CRC32C are compared. If both match, another
uploader, or an earlier attempt whose answer was lost, has stored the file.

Requests: https://cloud.google.com/storage/docs/json_api/v1/objects
"""

import asyncio
import base64
import json
import mimetypes
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import google_crc32c

from keras_remote_airflow.core.cloud.retry import RefusedError, RetryableError, failure
from keras_remote_airflow.core.cloud.store import (
    FileToSend,
    ObjectInfo,
    ObjectToFetch,
    Page,
    conflict,
    encode_crc32c,
    ignore_moved,
)
from keras_remote_airflow.core.cloud.transfer import (
    CHUNK_BYTES,
    Disk,
    Sink,
    Source,
    Transit,
    check_unchanged,
    read_whole,
)
from keras_remote_airflow.core.cloud.transport import MAX_REQUESTS, Transport
from keras_remote_airflow.core.errors import IntegrityError, StoreError
from keras_remote_airflow.core.layout import MAX_MARKER_BYTES

_T = TypeVar("_T")

# Custom metadata that carries a file's digest (see core.disk.hashing), hex.
DIGEST_KEY = "keras-remote-digest"

# Up to this size a file travels in one request, above in a resumable session.
_SINGLE_REQUEST_BYTES = 8 << 20
# What one streamed transfer keeps in memory: a chunk here, and about as much in socket buffers.
_STREAMING_BYTES = 2 * CHUNK_BYTES
# Random for each process, so that no content contains it on purpose.
_BOUNDARY = secrets.token_hex(16)
_CRC32C_HEADER = re.compile(r"crc32c=([A-Za-z0-9+/=]+)")


class GcsStore:
    """An `ObjectStore` on Cloud Storage's JSON API.

    Args:
        bucket: bare name of the bucket.
        transport: an open transport.
    """

    def __init__(self, bucket: str, transport: Transport) -> None:
        self.bucket = bucket
        self._transport = transport
        self._disk = Disk()
        self._objects = f"/storage/v1/b/{quote(bucket, safe='')}/o"
        self._create_url = f"/upload{self._objects}?" + urlencode(
            {"ifGenerationMatch": 0, "fields": "generation"}
        )

    def _uri(self, name: str) -> str:
        return f"gs://{self.bucket}/{name}"

    def _object(self, name: str, **query: object) -> str:
        return f"{self._objects}/{quote(name, safe='')}?{urlencode(query)}"

    # Small objects and listings; `aread` and `alist_page` are for work on the transport's own loop

    def read(self, name: str) -> bytes | None:
        return self.run(self.aread(name))

    async def aread(self, name: str) -> bytes | None:
        async def attempt() -> tuple[int, bytes]:
            async with self._transport.request(
                "GET", self._object(name, alt="media"), expected=(200, 404)
            ) as answer:
                body = await _read_at_most(answer.body, MAX_MARKER_BYTES)
                if len(body) > MAX_MARKER_BYTES:
                    return answer.status, body
                declared = _CRC32C_HEADER.search(",".join(answer.headers.getall("x-goog-hash", ())))
                if declared and _decode(declared[1]) != google_crc32c.value(body):
                    raise RetryableError("its bytes disagree with the x-goog-hash sent along")
                return answer.status, body

        status, body = await self._transport.retry.run(f"reading {self._uri(name)}", attempt)
        if status == 200:
            return body
        self._check_bucket(body)
        return None

    def list_page(self, prefix: str, token: str | None = None) -> Page:
        return self.run(self.alist_page(prefix, token))

    async def alist_page(self, prefix: str, token: str | None = None) -> Page:
        query = {
            "prefix": prefix,
            "fields": "items(name,size,crc32c,generation,metadata),nextPageToken",
            **({"pageToken": token} if token else {}),
        }

        async def attempt() -> Page:
            status, _, body = await self._transport.exchange(
                "GET", f"{self._objects}?{urlencode(query)}", expected=(200, 404)
            )
            if status == 404:
                self._check_bucket(body)
                raise failure(status, body)
            with _understanding(body):
                page = json.loads(body)
                items = [_info(item) for item in page.get("items", ())]
                return Page(items, page.get("nextPageToken"))

        return await self._transport.retry.run(f"listing {self._uri(prefix)}", attempt)

    def _check_bucket(self, body: bytes) -> None:
        """Raise StoreError if this is the body of the 404 for a missing bucket.

        Cloud Storage tells it from a missing object by its words alone.
        """
        if b"bucket does not exist" in body:
            raise StoreError(
                f"bucket {self.bucket} does not exist: check its name, or create it.", status=404
            )

    def create(self, name: str, content: bytes) -> bool:
        declared = {"name": name, "crc32c": encode_crc32c(google_crc32c.value(content))}
        headers, head, tail = _multipart(declared, "application/json")
        url = self._create_url + "&uploadType=multipart"
        body = head + content + tail

        async def attempt() -> int:
            status, _, _ = await self._transport.exchange(
                "POST", url, expected=(200, 412), headers=headers, data=body
            )
            return status

        what = f"creating {self._uri(name)}"
        return self.run(self._transport.retry.run(what, attempt, len(body))) == 200

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Do work that awaits methods of this store; see `Transport.run`."""
        return self._transport.run(work)

    # Uploads

    def upload(
        self,
        files: Iterable[FileToSend],
        done: Callable[[FileToSend, bool], None],
        moved: Callable[[int], None] = ignore_moved,
    ) -> None:
        async def one(file: FileToSend) -> None:
            send = self._send_whole if file.size <= _SINGLE_REQUEST_BYTES else self._send_resumable
            with Transit(moved) as transit:
                was_sent = await send(file, transit)
            done(file, was_sent)

        self._transport.run(self._concurrently(files, one))

    async def _concurrently(
        self, items: Iterable[_T], work: Callable[[_T], Awaitable[None]]
    ) -> None:
        """Await `work` for every item, concurrently; the first error wins."""
        waiting = iter(items)

        async def worker() -> None:
            for item in waiting:
                await work(item)

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(MAX_REQUESTS):
                    group.create_task(worker())
        except BaseExceptionGroup as group_error:
            error = group_error.exceptions[0]
            raise error from error.__cause__  # "from None" would remove its cause

    async def _send_whole(self, file: FileToSend, transit: Transit) -> bool:
        """Send a file in one multipart request; return False if the object was there."""
        url = self._create_url + "&uploadType=multipart"
        headers, head, tail = _multipart(_declared(file), _content_type(file.name))

        async def attempt() -> int:
            if file.size <= CHUNK_BYTES:
                content = await self._disk.read(partial(read_whole, file))
                return await self._put("POST", url, file, headers, head + content + tail)
            headers["Content-Length"] = str(len(head) + file.size + len(tail))
            with Source(file) as source:
                pieces = source.pieces(0, transit, self._disk)
                return await self._put("POST", url, file, headers, _framed(head, pieces, tail))

        status = await self._transport.retry.run(
            self._uploading(file), attempt, min(file.size, _STREAMING_BYTES)
        )
        return status != 412 or await self._find_same(file)

    async def _send_resumable(self, file: FileToSend, transit: Transit) -> bool:
        """Send a large file through an upload session, going on where a broken attempt ended."""
        session: str | None = None
        committed = 0

        async def attempt() -> int:
            nonlocal session, committed
            with Source(file) as source:
                if session is None:
                    session = await self._open_session(file)
                    if session is None:
                        return 412
                else:
                    status, committed = await self._committed(session, file)
                    if status != 308:
                        # The session is gone: the next attempt opens another.
                        if status in (404, 410):
                            session, committed = None, 0
                            raise RetryableError("the upload session expired", status)
                        return status
                headers = {
                    "Content-Length": str(file.size - committed),
                    "Content-Range": f"bytes {committed}-{file.size - 1}/{file.size}",
                }
                pieces = source.pieces(committed, transit, self._disk)
                return await self._put("PUT", session, file, headers, pieces)

        status = await self._transport.retry.run(
            self._uploading(file), attempt, _STREAMING_BYTES, lambda: committed
        )
        return status != 412 or await self._find_same(file)

    def _uploading(self, file: FileToSend) -> str:
        return f"uploading {file.path} to {self._uri(file.name)}"

    async def _open_session(self, file: FileToSend) -> str | None:
        """Return the URL of a new upload session, or None if the object is there already."""
        headers = {
            "Content-Type": "application/json; charset=UTF-8",
            "X-Upload-Content-Type": _content_type(file.name),
            "X-Upload-Content-Length": str(file.size),
        }
        status, answered, _ = await self._transport.exchange(
            "POST",
            self._create_url + "&uploadType=resumable",
            expected=(200, 201, 412),
            headers=headers,
            data=json.dumps(_declared(file)).encode(),
        )
        with _understanding(b"no Location"):
            return answered["Location"] if status != 412 else None

    async def _committed(self, session: str, file: FileToSend) -> tuple[int, int]:
        """Ask a session how it stands; return the status and how many bytes it has."""
        headers = {"Content-Range": f"bytes */{file.size}", "Content-Length": "0"}
        status, answered, _ = await self._transport.exchange(
            "PUT", session, expected=(200, 201, 308, 404, 410, 412), headers=headers
        )
        received = answered.get("Range", "")
        return status, int(received.rpartition("-")[2]) + 1 if received else 0

    async def _put(
        self, method: str, url: str, file: FileToSend, headers: dict[str, str], data: Any
    ) -> int:
        """Send the file's bytes once; return 200 or 201 for stored, 412 for already there."""
        status, _, body = await self._transport.exchange(
            method, url, expected=(200, 201, 308, 400, 412), headers=headers, data=data
        )
        if status == 308:
            raise RetryableError("the upload session holds only part of the file", 308)
        if status != 400:
            return status
        # 400 is how Cloud Storage refuses bytes that are not the declared ones. Were they damaged
        # on the way, or has the file changed? The file on disk tells.
        await check_unchanged(file)
        if b"crc32c" in body.lower() or b"checksum" in body.lower() or b"hash" in body.lower():
            raise RetryableError("the bytes were damaged on the way (HTTP 400)", 400)
        raise failure(400, body)

    async def _find_same(self, file: FileToSend) -> bool:
        """Return False if the object that is there has the file's bytes; raise for any others."""
        uri = self._uri(file.name)
        url = self._object(file.name, fields="name,size,crc32c,generation")

        async def attempt() -> ObjectInfo | None:
            status, _, body = await self._transport.exchange("GET", url, expected=(200, 404))
            if status == 404:
                return None
            with _understanding(body):
                return _info(json.loads(body))

        there = await self._transport.retry.run(f"looking at {uri}", attempt)
        if there is None:
            raise StoreError(
                f"an object was deleted during the upload: {uri}. Find out what deletes objects "
                "there, then retry.",
                status=412,
                transient=True,
            )
        if (there.size, there.crc32c) != (file.size, file.crc32c):
            # Some servers answer 412 to a bad checksum too: look at the file before the object.
            await self._transport.retry.run(
                f"reading {file.path}", partial(check_unchanged, file), CHUNK_BYTES
            )
            raise conflict(uri, there, file.path, file.size, file.crc32c)
        return False

    # Downloads

    def download(
        self,
        objects: Iterable[ObjectToFetch],
        done: Callable[[ObjectToFetch], None],
        moved: Callable[[int], None] = ignore_moved,
    ) -> None:
        async def one(wanted: ObjectToFetch) -> None:
            with Transit(moved) as transit:
                await self._fetch(wanted, transit)
            done(wanted)

        self._transport.run(self._concurrently(objects, one))

    async def _fetch(self, wanted: ObjectToFetch, transit: Transit) -> None:
        info = wanted.info
        uri = self._uri(info.name)
        url = self._object(info.name, alt="media", generation=info.generation)
        with Sink(wanted, uri) as sink:

            async def attempt() -> None:
                headers = {"Range": f"bytes={sink.size}-"} if sink.size else {}
                async with self._transport.request(
                    "GET", url, expected=(200, 206, 404, 416), headers=headers
                ) as answer:
                    if answer.status == 416:
                        sink.restart()
                        raise RetryableError("the server refused the requested range", 416)
                    if answer.status == 404:
                        raise IntegrityError(
                            "an object is gone or was replaced since it was listed (generation "
                            f"{info.generation}): {uri}. Retry; if it stays away, have the data "
                            "uploaded again."
                        )
                    if answer.status == 200:
                        sink.restart()
                    async for piece in answer.body:
                        sink.add(piece)
                        if info.size > CHUNK_BYTES:
                            transit.reach(sink.size)
                sink.check()

            await self._transport.retry.run(
                f"downloading {uri}",
                attempt,
                min(info.size, _STREAMING_BYTES),
                lambda: sink.size,
            )


async def _framed(head: bytes, pieces: AsyncIterator[bytes], tail: bytes) -> AsyncIterator[bytes]:
    yield head
    async for piece in pieces:
        yield piece
    yield tail


def _multipart(declared: dict[str, Any], content_type: str) -> tuple[dict[str, str], bytes, bytes]:
    """Return headers, and what goes before and after the content of a multipart upload."""
    head = (
        f"--{_BOUNDARY}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n"
        f"{json.dumps(declared)}\r\n--{_BOUNDARY}\r\nContent-Type: {content_type}\r\n\r\n"
    )
    headers = {"Content-Type": f'multipart/related; boundary="{_BOUNDARY}"'}
    return headers, head.encode(), f"\r\n--{_BOUNDARY}--\r\n".encode()


def _declared(file: FileToSend) -> dict[str, Any]:
    return {
        "name": file.name,
        "crc32c": encode_crc32c(file.crc32c),
        "metadata": {DIGEST_KEY: file.digest.hex()},
    }


def _content_type(name: str) -> str:
    suffixes = name.rpartition("/")[2].split(".")[1:]
    return _content_type_of(".".join(["name", *suffixes[-2:]]))  # two, as in ".tar.gz"


@lru_cache(1024)
def _content_type_of(name: str) -> str:
    return mimetypes.guess_type(name, strict=False)[0] or "application/octet-stream"


@contextmanager
def _understanding(body: bytes) -> Iterator[None]:
    """Raise RefusedError for an answer that Cloud Storage would not give."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as exc:
        raise RefusedError(
            f"the server's answer is not a Cloud Storage answer, or is incomplete ({body[:80]!r})",
            remedy="Check the endpoint, STORAGE_EMULATOR_HOST and the proxy.",
        ) from exc


async def _read_at_most(pieces: AsyncIterator[bytes], limit: int) -> bytes:
    """Return the whole body, or a little more than `limit` bytes of a larger one."""
    body = b""
    async for piece in pieces:
        body += piece
        if len(body) > limit:
            break
    return body


def _info(item: dict[str, Any]) -> ObjectInfo:
    return ObjectInfo(
        item["name"],
        int(item["size"]),
        _decode(item["crc32c"]),
        int(item["generation"]),
        item.get("metadata", {}).get(DIGEST_KEY),
    )


def _decode(crc32c: str) -> int:
    return int.from_bytes(base64.b64decode(crc32c), "big")
