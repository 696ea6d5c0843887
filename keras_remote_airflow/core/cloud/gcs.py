"""Cloud Storage's answer to `core.cloud.store`.

Nothing here overwrites or deletes: every write is create-only (`ifGenerationMatch=0`) and declares
the CRC32C that was taken when the data was hashed, so Cloud Storage refuses bytes that are not the
hashed ones. "Precondition failed" is answered by comparing size and CRC32C with what is there:
equal means that a concurrent uploader, or an earlier attempt whose answer was lost, was first.

Requests: https://cloud.google.com/storage/docs/json_api/v1/objects
"""

import asyncio
import base64
import json
import logging
import mimetypes
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import aiohttp
import google_crc32c

from keras_remote_airflow.core.cloud.retry import RetryableError, refusal
from keras_remote_airflow.core.cloud.store import ObjectToFetch, ObjectInfo, Page, FileToSend, conflict, encode_crc32c, ignore_moved
from keras_remote_airflow.core.cloud.transfer import Transit, Disk, Source, Sink, read_whole, check_unchanged, CHUNK_BYTES
from keras_remote_airflow.core.cloud.transport import Transport, pausing
from keras_remote_airflow.core.errors import IntegrityError, StoreError
from keras_remote_airflow.core.layout import MAX_MARKER_BYTES

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
# Custom metadata that carries a file's digest (see core.disk.hashing), hex.
DIGEST_KEY = "keras-remote-digest"
# Workers that one call may always have, even while the limiter is full (not counted: those that
# pause before another attempt). Or another call on the same transport could keep it from starting.
_FEW = 16
# Up to this size a file travels in one request, above in a resumable session.
_SINGLE_REQUEST = 8 << 20
# What one streamed transfer keeps in memory: a piece here, and about as much in socket buffers.
_STREAMING = 2 * CHUNK_BYTES
# Drawn once a process: no content can have known it.
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

    # Small objects and listings

    def read(self, name: str) -> bytes | None:
        what = f"reading {self._uri(name)}"
        url = self._object(name, alt="media")

        async def attempt() -> tuple[int, bytes]:
            async with self._transport.request(what, "GET", url, expected=(200, 404)) as response:
                body = await _read_at_most(response.content, MAX_MARKER_BYTES)
                if len(body) > MAX_MARKER_BYTES:
                    return response.status, body
                declared = _CRC32C_HEADER.search(
                    ",".join(response.headers.getall("x-goog-hash", ()))
                )
                if declared and _decode(declared[1]) != google_crc32c.value(body):
                    raise RetryableError("its bytes disagree with the x-goog-hash sent along")
                return response.status, body

        status, body = self._transport.run(self._transport.retrying(what, 0, attempt))
        if status == 200:
            return body
        # Cloud Storage tells a missing bucket from a missing object by its words alone.
        if b"bucket does not exist" in body:
            raise StoreError(
                f"bucket {self.bucket} does not exist: check its name, or create it.", status=404
            )
        return None

    def list_page(self, prefix: str, token: str | None = None) -> Page:
        query = {
            "prefix": prefix,
            "fields": "items(name,size,crc32c,generation,metadata),nextPageToken",
            **({"pageToken": token} if token else {}),
        }
        _, body = self._transport.run(
            self._transport.call(
                f"listing {self._uri(prefix)}", "GET", f"{self._objects}?{urlencode(query)}"
            )
        )
        with _answering(f"listing {self._uri(prefix)}", body):
            page = json.loads(body)
            return Page([_info(item) for item in page.get("items", ())], page.get("nextPageToken"))

    def create(self, name: str, content: bytes) -> bool:
        declared = {"name": name, "crc32c": encode_crc32c(google_crc32c.value(content))}
        headers, data = _multipart(declared, "application/json", content)
        status, _ = self._transport.run(
            self._transport.call(
                f"creating {self._uri(name)}",
                "POST",
                self._create_url + "&uploadType=multipart",
                expected=(200, 412),
                headers=headers,
                data=data,
            )
        )
        return status == 200

    # Uploads

    def upload(
        self,
        uploads: Iterable[FileToSend],
        done: Callable[[FileToSend, bool], None],
        moved: Callable[[int], None] = ignore_moved,
    ) -> None:
        async def one(upload: FileToSend) -> None:
            send = self._send_whole if upload.size <= _SINGLE_REQUEST else self._send_resumable
            with Transit(moved) as transit:
                was_sent = await send(upload, transit)
            done(upload, was_sent)

        self._transport.run(self._concurrently(uploads, one))

    async def _concurrently(
        self, items: Iterable[_T], work: Callable[[_T], Awaitable[None]]
    ) -> None:
        """Await `work` for every item, concurrently; the first error wins.

        With as many workers as the transport makes requests, and others for those that pause before
        they try again, up to its concurrency: more would cost memory and time only to wait.
        """
        waiting = iter(items)
        limiter = self._transport.limiter
        workers = paused = 0

        def fill() -> None:
            nonlocal workers
            if workers < self._transport.concurrency and (
                workers - paused < _FEW or limiter.has_room()
            ):
                workers += 1
                group.create_task(worker())

        @contextmanager
        def pause() -> Iterator[None]:
            nonlocal paused
            paused += 1
            try:
                fill()
                yield
            finally:
                paused -= 1

        async def worker() -> None:
            nonlocal workers
            pausing.set(pause)
            for item in waiting:
                fill()
                await work(item)
                if workers - paused > _FEW and limiter.is_crowded():
                    break
            workers -= 1

        try:
            async with asyncio.TaskGroup() as group:
                fill()
        except BaseExceptionGroup as group_error:
            error = group_error.exceptions[0]
            raise error from error.__cause__  # from None would take the cause that it has

    async def _send_whole(self, upload: FileToSend, transit: "Transit") -> bool:
        """Send a file in one multipart request; return False if the object was there."""
        what = f"uploading {upload.path} to {self._uri(upload.name)}"
        declared = _declared(upload)
        kind = _content_type(upload.name)

        async def post(headers: dict[str, str], data: bytes | AsyncIterator[bytes]) -> int:
            url = self._create_url + "&uploadType=multipart"
            return await self._put(what, "POST", url, upload, headers, data)

        async def attempt() -> int:
            if upload.size <= CHUNK_BYTES:
                content = await self._disk.read(partial(read_whole, upload))
                return await post(*_multipart(declared, kind, content))
            headers, head, tail = _multipart_frame(declared, kind)
            headers["Content-Length"] = str(len(head) + upload.size + len(tail))
            with Source(upload) as source:
                return await post(
                    headers, _framed(head, source.pieces(0, transit, self._disk), tail)
                )

        size = min(upload.size, _STREAMING)
        return await self._settle(upload, await self._transport.retrying(what, size, attempt))

    async def _send_resumable(self, upload: FileToSend, transit: "Transit") -> bool:
        """Send a large file through an upload session, going on where a broken attempt ended."""
        what = f"uploading {upload.path} to {self._uri(upload.name)}"
        session: str | None = None
        committed = 0

        async def attempt() -> int:
            nonlocal session, committed
            with Source(upload) as source:
                if session is None:
                    session = await self._open_session(what, upload)
                    if session is None:
                        return 412
                else:
                    status, committed = await self._committed(what, session, upload)
                    if status != 308:
                        # The session is gone: the next attempt opens another.
                        if status in (404, 410):
                            session, committed = None, 0
                            raise RetryableError("the upload session expired", status)
                        return status
                headers = {
                    "Content-Length": str(upload.size - committed),
                    "Content-Range": f"bytes {committed}-{upload.size - 1}/{upload.size}",
                }
                return await self._put(
                    what,
                    "PUT",
                    session,
                    upload,
                    headers,
                    source.pieces(committed, transit, self._disk),
                )

        status = await self._transport.retrying(what, _STREAMING, attempt, lambda: committed)
        return await self._settle(upload, status)

    async def _open_session(self, what: str, upload: FileToSend) -> str | None:
        headers = {
            "Content-Type": "application/json; charset=UTF-8",
            "X-Upload-Content-Type": _content_type(upload.name),
            "X-Upload-Content-Length": str(upload.size),
        }
        status, answered, _ = await self._transport.exchange(
            what,
            "POST",
            self._create_url + "&uploadType=resumable",
            expected=(200, 201, 412),
            headers=headers,
            data=json.dumps(_declared(upload)).encode(),
        )
        with _answering(what, b"no Location"):
            return answered["Location"] if status != 412 else None

    async def _committed(self, what: str, session: str, upload: FileToSend) -> tuple[int, int]:
        headers = {"Content-Range": f"bytes */{upload.size}", "Content-Length": "0"}
        status, answered, _ = await self._transport.exchange(
            what, "PUT", session, expected=(200, 201, 308, 404, 410, 412), headers=headers
        )
        received = answered.get("Range", "")
        return status, int(received.rpartition("-")[2]) + 1 if received else 0

    async def _put(
        self, what: str, method: str, url: str, upload: FileToSend, headers: dict[str, str], data: Any
    ) -> int:
        """Send the file's bytes once; return 200 or 201 for stored, 412 for already there."""
        status, _, body = await self._transport.exchange(
            what, method, url, expected=(200, 201, 308, 400, 412), headers=headers, data=data
        )
        if status == 308:
            raise RetryableError("the upload session holds only part of the file", 308)
        if status != 400:
            return status
        # 400 is how Cloud Storage refuses bytes that are not the declared ones. Were they damaged
        # on the way, or has the file changed? The disk knows.
        await check_unchanged(upload)
        if b"crc32c" in body.lower() or b"checksum" in body.lower() or b"hash" in body.lower():
            raise RetryableError("the bytes were damaged on the way (HTTP 400)", 400)
        raise refusal(what, 400, body)

    async def _settle(self, upload: FileToSend, status: int) -> bool:
        """Answer "precondition failed": the same bytes are fine, any others a conflict."""
        if status != 412:
            return True
        what = f"looking at {self._uri(upload.name)}"
        url = self._object(upload.name, fields="name,size,crc32c,generation")
        found, body = await self._transport.call(what, "GET", url, expected=(200, 404))
        if found == 404:
            raise StoreError(
                f"{self._uri(upload.name)} was there and is gone: something deletes objects while "
                "they are uploaded. Retry.",
                status=412,
                transient=True,
            )
        with _answering(what, body):
            there = _info(json.loads(body))
        if (there.size, there.crc32c) != (upload.size, upload.crc32c):
            # Some servers answer 412 to a bad checksum too: look at the file before the object.
            what = f"reading {upload.path}"
            await self._transport.retrying(what, CHUNK_BYTES, partial(check_unchanged, upload))
            raise conflict(self._uri(upload.name), there, upload.path, upload.size, upload.crc32c)
        return False

    # Downloads

    def download(
        self,
        downloads: Iterable[ObjectToFetch],
        done: Callable[[ObjectToFetch], None],
        moved: Callable[[int], None] = ignore_moved,
    ) -> None:
        async def one(download: ObjectToFetch) -> None:
            with Transit(moved) as transit:
                await self._fetch(download, transit)
            done(download)

        self._transport.run(self._concurrently(downloads, one))

    async def _fetch(self, download: ObjectToFetch, transit: "Transit") -> None:
        info = download.info
        uri = self._uri(info.name)
        what = f"downloading {uri}"
        url = self._object(info.name, alt="media", generation=info.generation)
        with Sink(download, uri) as sink:

            async def attempt() -> None:
                headers = {"Range": f"bytes={sink.size}-"} if sink.size else {}
                async with self._transport.request(
                    what, "GET", url, expected=(200, 206, 404, 416), headers=headers
                ) as response:
                    if response.status == 416:
                        sink.restart()
                        raise RetryableError("the rest of it is not to be had", 416)
                    if response.status == 404:
                        raise IntegrityError(
                            f"{uri} is gone or was replaced since it was listed (generation "
                            f"{info.generation}). Retry; if it stays away, have the data uploaded "
                            "again."
                        )
                    if response.status == 200:
                        sink.restart()
                    async for piece in response.content.iter_chunked(CHUNK_BYTES):
                        sink.add(piece)
                        if info.size > CHUNK_BYTES:
                            transit.reach(sink.size)
                sink.check()

            size = min(info.size, _STREAMING)
            await self._transport.retrying(what, size, attempt, lambda: sink.size)


async def _framed(head: bytes, pieces: AsyncIterator[bytes], tail: bytes) -> AsyncIterator[bytes]:
    yield head
    async for piece in pieces:
        yield piece
    yield tail


def _multipart_frame(declared: dict[str, Any], kind: str) -> tuple[dict[str, str], bytes, bytes]:
    """Return headers, and what goes before and after the content of a multipart upload."""
    head = (
        f"--{_BOUNDARY}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n"
        f"{json.dumps(declared)}\r\n--{_BOUNDARY}\r\nContent-Type: {kind}\r\n\r\n"
    )
    headers = {"Content-Type": f'multipart/related; boundary="{_BOUNDARY}"'}
    return headers, head.encode(), f"\r\n--{_BOUNDARY}--\r\n".encode()


def _multipart(declared: dict[str, Any], kind: str, content: bytes) -> tuple[dict[str, str], bytes]:
    headers, head, tail = _multipart_frame(declared, kind)
    return headers, head + content + tail


def _declared(upload: FileToSend) -> dict[str, Any]:
    return {
        "name": upload.name,
        "crc32c": encode_crc32c(upload.crc32c),
        "metadata": {DIGEST_KEY: upload.digest.hex()},
    }


def _content_type(name: str) -> str:
    suffixes = name.rpartition("/")[2].split(".")[1:]
    return _content_type_of(".".join(["name", *suffixes[-2:]]))  # two, as in ".tar.gz"


@lru_cache(1024)
def _content_type_of(name: str) -> str:
    return mimetypes.guess_type(name, strict=False)[0] or "application/octet-stream"


@contextmanager
def _answering(what: str, body: bytes) -> Iterator[None]:
    """Raise StoreError for an answer that Cloud Storage would not give."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise StoreError(
            f"{what}: what answered is not Cloud Storage, or not all of it ({body[:80]!r}). Check "
            "the endpoint, STORAGE_EMULATOR_HOST and the proxy."
        ) from exc


async def _read_at_most(content: aiohttp.StreamReader, limit: int) -> bytes:
    """Return the whole body, or a little more than `limit` bytes of a larger one."""
    body = b""
    async for piece in content.iter_any():
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
