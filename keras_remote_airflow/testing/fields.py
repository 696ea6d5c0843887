"""Partial responses: the `fields` parameter.

https://cloud.google.com/storage/docs/json_api#partial-response: a comma-separated list of
selectors, each a name, a path `a/b`, a name with sub-selectors `a(b,c)`, or `*`.
"""

import functools
import re
from collections import deque
from typing import Any

from .errors import ApiError

# A name to what is wanted below it; an empty tree means everything.
Tree = dict[str, Any]


def _names(text: str) -> Tree:
    return {name: {} for name in text.split()}


_OBJECT = _names(
    "acl bucket cacheControl componentCount contentDisposition contentEncoding contentLanguage "
    "contentType contexts crc32c customTime customerEncryption etag eventBasedHold generation "
    "hardDeleteTime id kind kmsKeyName md5Hash mediaLink metadata metageneration name owner "
    "restoreToken retention retentionExpirationTime selfLink size softDeleteTime storageClass "
    "temporaryHold timeCreated timeDeleted timeFinalized timeStorageClassUpdated updated"
)
_BUCKET = _names(
    "acl autoclass billing cors customPlacementConfig defaultEventBasedHold defaultObjectAcl "
    "encryption etag generation hardDeleteTime hierarchicalNamespace iamConfiguration id ipFilter "
    "kind labels lifecycle location locationType logging metageneration name objectRetention owner "
    "projectNumber retentionPolicy rpo satisfiesPZI satisfiesPZS selfLink softDeletePolicy "
    "softDeleteTime storageClass timeCreated updated versioning website"
)
# What can be selected of an answer, by what it describes.
_KNOWN: dict[str, Tree] = {
    "bucket": _BUCKET,
    "buckets": {**_names("kind nextPageToken unreachable"), "items": _BUCKET},
    "object": _OBJECT,
    "objects": {**_names("kind nextPageToken prefixes"), "items": _OBJECT},
    "rewriteTo": {
        **_names("done kind objectSize rewriteToken totalBytesRewritten"),
        "resource": _OBJECT,
    },
    "iam": {},
}


@functools.lru_cache(maxsize=128)
def parse_fields(text: str, kind: str) -> Tree:
    """Parse a selector list; raise 400 if it is malformed or names what no such answer has."""
    tokens = deque(re.findall(r"[,/()]|[^,/()]+", text))
    try:
        tree = _selectors(tokens, _KNOWN[kind])
    except (LookupError, ValueError):
        tokens.append(text)
    if tokens:
        raise ApiError(400, "invalidParameter", f"Invalid field selection {text}")
    return tree


def _selectors(tokens: deque[str], known: Tree) -> Tree:
    tree: Tree = {}
    _selector(tokens, known, tree)
    while tokens and tokens[0] == ",":
        tokens.popleft()
        _selector(tokens, known, tree)
    return tree


def _selector(tokens: deque[str], known: Tree, tree: Tree) -> None:
    name = tokens.popleft().strip()
    if name in ("", *",/()") or (known and name != "*" and name not in known):
        raise ValueError(name)
    below: Tree = {}
    if tokens and tokens[0] == "/":
        tokens.popleft()
        _selector(tokens, known.get(name, {}), below)
    elif tokens and tokens[0] == "(":
        tokens.popleft()
        below = _selectors(tokens, known.get(name, {}))
        if tokens.popleft() != ")":
            raise ValueError(name)
    whole = name in tree and not (tree[name] and below)
    tree[name] = {} if whole else {**tree.get(name, {}), **below}


def select(value: Any, tree: Tree) -> Any:
    """The part of a JSON value that the selectors name."""
    if not tree:
        return value
    if isinstance(value, list):
        return [select(item, tree) for item in value]
    if not isinstance(value, dict):
        return value
    if "*" in tree:
        return {key: select(item, tree.get(key) or tree["*"]) for key, item in value.items()}
    return {key: select(item, tree[key]) for key, item in value.items() if key in tree}
