"""Objects in one bucket through Cloud Storage's JSON API; see `core.cloud.store`.

Nothing here overwrites or deletes: every write is create-only (`ifGenerationMatch=0`) and declares
the CRC32C that was taken when the data was hashed, so Cloud Storage refuses bytes that are not the
hashed ones. The size and CRC32C in the answer are compared too, for servers that don't check. On
"Precondition failed" (412), those of the object that is there are compared. If both match, another
uploader, or an earlier attempt whose answer was lost, has stored the file.

Fields of an answer are optional: listings of buckets with a customer-managed key lack `crc32c`
(https://cloud.google.com/storage/docs/encryption/customer-managed-keys). A request for the object
itself tells it, and so do the headers of a download.

Requests: https://cloud.google.com/storage/docs/json_api/v1/objects
"""

import asyncio
import binascii
import json
import mimetypes
import re
import secrets
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Sequence,
)
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, TypeVar
from urllib.parse import quote, urlencode

import google_crc32c
from multidict import CIMultiDictProxy

from keras_remote_airflow.core.cloud.retry import (
    RefusedError,
    RetryableError,
    failure,
    is_markup,
    not_understood,
)
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
# Statuses of an answer to the bytes of a file, sent whole or into a session.
_EXPECTED = {"POST": (200, 400, 412), "PUT": (200, 201, 308, 400, 404, 410, 412)}
# How often a server may say of one object that it is there (412) and then that it is not (404).
_MAX_CONTRADICTIONS = 3
# What a parser raises for an answer that Cloud Storage would not give.
_NOT_UNDERSTOOD = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
)
# How many pages of a listing may be empty before one that is not.
_MAX_EMPTY_PAGES = 1000
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
            {"ifGenerationMatch": 0, "fields": "size,crc32c,generation"}
        )

    def _uri(self, name: str) -> str:
        return f"gs://{self.bucket}/{name}"

    def _object(self, name: str, **query: object) -> str:
        return f"{self._objects}/{quote(name, safe='')}?{urlencode(query)}"

    # Small objects and listings; `aread` and `alist_page` are for work on the transport's own loop

    def read(self, name: str) -> bytes | None:
        return self.run(self.aread(name))

    async def aread(self, name: str) -> bytes | None:
        async def attempt() -> bytes | None:
            status, headers, body = await self._transport.exchange(
                "GET",
                self._object(name, alt="media"),
                expected=(200, 404),
                at_most=MAX_MARKER_BYTES,
            )
            if status == 404:
                self._check_bucket(body)
                return None
            crc32c = _crc32c_of(headers)
            if crc32c is None and body and not body.lstrip().startswith(b"{"):
                # The page of a proxy that wants a login, for instance: no reason to give up.
                raise RetryableError(f"not a Cloud Storage answer, or no marker ({body[:40]!r})")
            is_whole = len(body) <= MAX_MARKER_BYTES
            if is_whole and crc32c not in (None, google_crc32c.value(body)):
                raise RetryableError("its bytes disagree with the x-goog-hash sent along")
            return body

        return await self._transport.retry.run(f"reading {self._uri(name)}", attempt)

    def list_page(self, prefix: str, token: str | None = None) -> Page:
        return self.run(self.alist_page(prefix, token))

    async def alist_page(self, prefix: str, token: str | None = None) -> Page:
        # Only the missing token says that a listing is over, see
        # https://cloud.google.com/storage/docs/json_api/v1/objects/list.
        for _ in range(_MAX_EMPTY_PAGES):
            page = await self._any_page(prefix, token)
            token = page.next_token
            if page.objects or token is None:
                return page
        raise StoreError(
            f"a listing began with {_MAX_EMPTY_PAGES} empty pages: {self._uri(prefix)}. Check the "
            "endpoint and STORAGE_EMULATOR_HOST."
        )

    async def _any_page(self, prefix: str, token: str | None) -> Page:
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
                items = [_info(item) for item in page.get("items") or ()]
                "".join([info.name for info in items]).encode()  # all are text
                next_token = page.get("nextPageToken") or None
            if next_token is not None and next_token == token:
                raise not_understood("a page of a listing leads to itself")
            return Page(items, next_token)

        return await self._transport.retry.run(f"listing {self._uri(prefix)}", attempt)

    def stat(self, names: Sequence[str]) -> list[ObjectInfo | None]:
        found: dict[str, ObjectInfo | None] = {}

        async def one(name: str) -> None:
            found[name] = await self._stat(name)

        self.run(self._concurrently(names, one))
        return [found[name] for name in names]

    async def _stat(self, name: str) -> ObjectInfo | None:
        url = self._object(name, fields="size,crc32c,generation,metadata")

        async def attempt() -> ObjectInfo | None:
            status, _, body = await self._transport.exchange("GET", url, expected=(200, 404))
            if status == 404:
                self._check_bucket(body)
                return None
            info = _comparable(name, body)
            if info is None:
                raise not_understood(body[:80])
            return info

        return await self._transport.retry.run(f"looking at {self._uri(name)}", attempt)

    def _check_bucket(self, body: bytes) -> None:
        """Raise an error if this is not the body of the 404 for a missing object.

        Cloud Storage tells a missing bucket from that by its words alone.
        """
        if is_markup(body):
            raise failure(404, body)
        if b"bucket does not exist" in body:
            raise StoreError(
                f"bucket {self.bucket} does not exist: check its name, or create it.", status=404
            )

    def create(self, name: str, content: bytes) -> bool:
        crc32c = google_crc32c.value(content)
        declared = {"name": name, "crc32c": encode_crc32c(crc32c)}
        headers, head, tail = _multipart(declared, "application/json")
        url = self._create_url + "&uploadType=multipart"
        sent = head + content + tail

        async def attempt() -> tuple[int, bytes]:
            status, _, body = await self._transport.exchange(
                "POST", url, expected=(200, 400, 412), headers=headers, data=sent
            )
            if status == 400:
                raise _bad_request(body)
            return status, body

        what = f"creating {self._uri(name)}"
        status, body = self.run(self._transport.retry.run(what, attempt, len(sent)))
        if status == 412:
            return False
        there = _comparable(name, body)
        if there and not there.holds(len(content), crc32c, b""):
            raise conflict(self._uri(name), there, "memory", len(content), crc32c)
        return True

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
            with Transit(moved) as transit:
                was_sent = await self._send(file, transit)
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
                workers = [group.create_task(worker()) for _ in range(MAX_REQUESTS)]
        except BaseExceptionGroup as group_error:
            error = group_error.exceptions[0]
            raise error from error.__cause__  # "from None" would remove its cause
        # A library's CancelledError ends one task, and a task group takes that for its success.
        if any(one.cancelled() for one in workers):
            raise StoreError(
                f"a transfer was cut short by a library: gs://{self.bucket}. Retry.", transient=True
            )

    async def _send(self, file: FileToSend, transit: Transit) -> bool:
        """Store a file; return False if an object that holds the same bytes was there."""
        send = self._send_whole if file.size <= _SINGLE_REQUEST_BYTES else self._send_resumable
        for _ in range(_MAX_CONTRADICTIONS):
            status, body = await send(file, transit)
            there = _comparable(file.name, body) if status != 412 else None
            there = there or await self._stat(file.name)
            if there and there.holds(file.size, file.crc32c, file.digest):
                return status != 412
            # Some servers answer 412 to a bad checksum, others check none: look at the file before
            # anything is concluded from the object.
            await self._transport.retry.run(
                f"reading {file.path}", partial(check_unchanged, file), CHUNK_BYTES
            )
            if there:
                raise conflict(self._uri(file.name), there, file.path, file.size, file.crc32c)
        raise StoreError(
            f"{_MAX_CONTRADICTIONS} times an object was there (HTTP 412) and then gone (404): "
            f"{self._uri(file.name)}, from {file.path}. Find out what deletes objects there, or "
            "damages data on the way; then retry.",
            status=412,
            transient=True,
        )

    async def _send_whole(self, file: FileToSend, transit: Transit) -> tuple[int, bytes]:
        """Send a file in one multipart request; return status and body of the answer."""
        url = self._create_url + "&uploadType=multipart"
        headers, head, tail = _multipart(_declared(file), _content_type(file.name))

        async def attempt() -> tuple[int, bytes]:
            if file.size <= CHUNK_BYTES:
                content = await self._disk.read(partial(read_whole, file))
                return await self._put("POST", url, file, headers, head + content + tail)
            headers["Content-Length"] = str(len(head) + file.size + len(tail))
            with Source(file) as source:
                pieces = source.pieces(0, transit, self._disk)
                return await self._put("POST", url, file, headers, _framed(head, pieces, tail))

        return await self._transport.retry.run(
            self._uploading(file), attempt, min(file.size, _STREAMING_BYTES)
        )

    async def _send_resumable(self, file: FileToSend, transit: Transit) -> tuple[int, bytes]:
        """Send a large file through an upload session, going on where a broken attempt ended."""
        session: str | None = None
        committed = 0

        async def attempt() -> tuple[int, bytes]:
            nonlocal session, committed
            with Source(file) as source:
                if session is None:
                    session = await self._open_session(file)
                    if session is None:
                        return 412, b""
                else:
                    status, committed, body = await self._committed(session, file)
                    # The session is gone, or of no use: the next attempt opens another.
                    if status in (404, 410) or committed >= file.size:
                        session, committed = None, 0
                        raise RetryableError("the upload session is of no use any more", status)
                    if status != 308:
                        return status, body
                headers = {
                    "Content-Length": str(file.size - committed),
                    "Content-Range": f"bytes {committed}-{file.size - 1}/{file.size}",
                }
                pieces = source.pieces(committed, transit, self._disk)
                return await self._put("PUT", session, file, headers, pieces)

        return await self._transport.retry.run(
            self._uploading(file), attempt, _STREAMING_BYTES, lambda: committed
        )

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

    async def _committed(self, session: str, file: FileToSend) -> tuple[int, int, bytes]:
        """Ask a session how it stands; return status, how many bytes it has, and the body."""
        headers = {"Content-Range": f"bytes */{file.size}", "Content-Length": "0"}
        status, answered, body = await self._transport.exchange(
            "PUT", session, expected=(200, 201, 308, 404, 410, 412), headers=headers
        )
        received = answered.get("Range", "") if status == 308 else ""
        with _understanding(received.encode()):
            return status, int(received.rpartition("-")[2]) + 1 if received else 0, body

    async def _put(
        self, method: str, url: str, file: FileToSend, headers: dict[str, str], data: Any
    ) -> tuple[int, bytes]:
        """Send the file's bytes once; return status (412: already there) and body of the answer."""
        status, _, body = await self._transport.exchange(
            method, url, expected=_EXPECTED[method], headers=headers, data=data
        )
        if status in (308, 404, 410):  # the next attempt asks the session, and may open another
            raise RetryableError("the upload session is gone, or holds only a part", status)
        if status != 400:
            return status, body
        # 400 is how Cloud Storage refuses bytes that are not the declared ones. Were they damaged
        # on the way, or has the file changed? The file on disk tells.
        await check_unchanged(file)
        raise _bad_request(body)

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
        name, size, _, generation, _ = wanted.info
        uri = self._uri(name)
        version = {} if generation is None else {"generation": generation}
        url = self._object(name, alt="media", **version)
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
                            f"{generation}): {uri}. Retry; if it stays away, have the data "
                            "uploaded again."
                        )
                    if answer.status == 200:
                        sink.restart()
                        if wanted.info.crc32c is None:
                            sink.crc32c = _crc32c_of(answer.headers)
                    async for piece in answer.body:
                        sink.add(piece)
                        if sink.size > CHUNK_BYTES:
                            transit.reach(sink.size)
                if sink.crc32c is None:
                    raise not_understood("a download without a checksum")
                sink.check()

            await self._transport.retry.run(
                f"downloading {uri}",
                attempt,
                _STREAMING_BYTES if size is None else min(size, _STREAMING_BYTES),
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
    except _NOT_UNDERSTOOD as exc:
        raise not_understood(body[:80]) from exc


def _bad_request(body: bytes) -> RetryableError | RefusedError:
    """Return the error for a 400 to bytes that are as declared here."""
    if any(word in body.lower() for word in (b"crc32c", b"checksum", b"hash")):
        return RetryableError("the bytes were damaged on the way (HTTP 400)", 400)
    return failure(400, body)


def _info(item: dict[str, Any]) -> ObjectInfo:
    size, crc32c, generation = item.get("size"), item.get("crc32c"), item.get("generation")
    return ObjectInfo(
        item["name"],
        None if size is None else int(size),
        None if crc32c is None else _decode(crc32c),
        None if generation is None else int(generation),
        (item.get("metadata") or {}).get(DIGEST_KEY),
    )


def _comparable(name: str, body: bytes) -> ObjectInfo | None:
    """Return what an answer says about one object, or None if size or CRC32C is not in it."""
    try:
        # Of bytes, `loads` first guesses the encoding, which takes as long as the rest.
        info = _info({**json.loads(body.decode()), "name": name})
    except _NOT_UNDERSTOOD:
        return None
    return None if info.size is None or info.crc32c is None else info


def _crc32c_of(headers: CIMultiDictProxy[str]) -> int | None:
    """Return the CRC32C in the headers of a download, or None if there is none."""
    declared = _CRC32C_HEADER.search(",".join(headers.getall("x-goog-hash", ())))
    with _understanding(b"x-goog-hash"):
        return _decode(declared[1]) if declared else None


def _decode(crc32c: str) -> int:
    encoded = binascii.a2b_base64(crc32c, strict_mode=True)
    if len(encoded) != 4:
        raise ValueError(f"not a CRC32C: {crc32c!r}")
    return int.from_bytes(encoded, "big")
