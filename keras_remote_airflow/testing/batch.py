"""Batches: many calls in one request, and their answers in one answer.

https://cloud.google.com/storage/docs/batch. Calls with media are not allowed in a batch, so the
lines may end as the client likes, and the standard library's parser for e-mail reads them.
"""

import uuid
from collections.abc import Callable
from email import message_from_bytes
from email.message import Message
from http.client import responses

from .calls import Call, Reply
from .errors import invalid

MAX_BATCH_CALLS = 100


def batch_reply(call: Call, answer: Callable[[Call], Reply]) -> Reply:
    """The answers to the calls in a batch, in order; one that fails does not stop the others."""
    parts = _parts(call)
    boundary = f"batch_{uuid.uuid4().hex}"
    lines: list[bytes] = []
    for part in parts:
        reply = answer(_call(part, call.headers.get("host", "127.0.0.1")))
        body = b"".join(reply.pieces)
        fields = {**reply.headers, "Content-Length": str(len(body))}
        head = [f"--{boundary}", "Content-Type: application/http"]
        if "content-id" in part:
            head.append(f"Content-ID: <response-{part['content-id'].strip('<>')}>")
        head += ["", f"HTTP/1.1 {reply.status} {responses.get(reply.status, '')}"]
        head += [f"{name}: {value}" for name, value in fields.items()]
        lines += ["\r\n".join(head).encode(), b"", body]
    lines += [f"--{boundary}--".encode(), b""]
    headers = {"Content-Type": f"multipart/mixed; boundary={boundary}"}
    return Reply(200, headers, b"\r\n".join(lines))


def _parts(call: Call) -> list[Message]:
    content_type = call.headers.get("content-type", "")
    batch = message_from_bytes(f"Content-Type: {content_type}\r\n\r\n".encode() + call.body)
    parts = batch.get_payload()
    if not isinstance(parts, list) or batch.defects:
        raise invalid("Failed to parse batch request: malformed multipart body.")
    if len(parts) > MAX_BATCH_CALLS:
        raise invalid(f"The batch has {len(parts)} calls; at most {MAX_BATCH_CALLS} are allowed.")
    return [part for part in parts if isinstance(part, Message)]


def _call(part: Message, host: str) -> Call:
    """The request in one part: a request line, headers, and perhaps a body."""
    content = part.get_payload(decode=True)
    line, _, rest = (content if isinstance(content, bytes) else b"").lstrip().partition(b"\n")
    words = line.decode("latin-1").split()
    if len(words) not in (2, 3):
        raise invalid(f"Failed to parse batch request: malformed request line {line!r}")
    inner = message_from_bytes(rest)
    headers = {"host": host} | {name.lower(): str(value) for name, value in inner.items()}
    body = inner.get_payload(decode=True)
    body = body.rstrip() if isinstance(body, bytes) else b""
    return Call(words[0], words[1], headers, bytearray(body), len(body))
