"""Pages of a listing over sorted names.

Cloud Storage lists names in the order of their UTF-8 bytes, which is the order of code points,
which is how Python compares `str`.
"""

import base64
import functools
import re
from bisect import bisect_left
from collections.abc import Callable, Mapping
from typing import NamedTuple

from .errors import invalid
from .objects import whole_number

MAX_RESULTS = 1000


class Page(NamedTuple):
    """Names and common prefixes of one page; `next` is the token of the following one."""

    names: list[str]
    prefixes: list[str]
    next: str | None


def list_page(names: list[str], query: Mapping[str, str]) -> Page:
    """One page of a sorted list of names. Costs a bisection and the page, not the whole list.

    The parameters are those of a request:
    https://cloud.google.com/storage/docs/json_api/v1/objects/list#parameters
    """
    prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
    end, after = query.get("endOffset", ""), _decode_token(query.get("pageToken", ""))
    with_trailing = query.get("includeTrailingDelimiter", "").lower() == "true"
    asked = whole_number(query, "maxResults") if query.get("maxResults") else None
    size = min(asked or MAX_RESULTS, MAX_RESULTS)
    found: list[str] = []
    prefixes: list[str] = []
    last = ""
    index = bisect_left(names, max(prefix, query.get("startOffset", ""), after))
    wanted = _glob_matcher(query.get("matchGlob", ""))
    while index < len(names):
        name = names[index]
        if not name.startswith(prefix) or (end and name >= end):
            break
        if name == after or (wanted is not None and not wanted(name)):
            index += 1
            continue
        common = ""
        if delimiter:
            at = name.find(delimiter, len(prefix))
            if at >= 0:
                common = name[: at + len(delimiter)]
        if common and after.startswith(common):
            # The page before ended inside this prefix, which it has shown.
            index = bisect_left(names, _successor(common), index)
            continue
        if len(found) + len(prefixes) >= size:
            token = base64.urlsafe_b64encode(b"after:" + last.encode()).decode()
            return Page(found, prefixes, token)
        if common:
            prefixes.append(common)
            if with_trailing and name == common:
                found.append(name)
            index = bisect_left(names, _successor(common), index)
            last = common
        else:
            found.append(name)
            index += 1
            last = name
    return Page(found, prefixes, None)


def _successor(prefix: str) -> str:
    """The smallest text greater than everything that starts with `prefix`."""
    for index in range(len(prefix) - 1, -1, -1):
        if ord(prefix[index]) < 0x10FFFF:
            return prefix[:index] + chr(ord(prefix[index]) + 1)
    return chr(0x10FFFF) * (len(prefix) + 1024)


def _decode_token(token: str) -> str:
    """The last name or prefix of the page that gave this token; 400 if no listing did."""
    if not token:
        return ""
    try:
        text = base64.urlsafe_b64decode(token.encode("ascii")).decode()
    except ValueError:
        text = ""
    if not text.startswith("after:"):
        raise invalid(f"Invalid value for pageToken: {token!r}")
    return text.removeprefix("after:")


_GLOB_TOKENS = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}


@functools.lru_cache(maxsize=64)
def _glob_matcher(glob: str) -> Callable[[str], object] | None:
    """https://cloud.google.com/storage/docs/json_api/v1/objects/list#list-objects-and-prefixes-using-glob"""
    if not glob:
        return None
    depth = 0
    pattern = ""
    for token in re.findall(r"\*\*/?|\*|\?|\[[^\]]+\]|\\.|[{},]|.", glob, re.DOTALL):
        if token in _GLOB_TOKENS:
            pattern += _GLOB_TOKENS[token]
        elif token == "{" or (token in "}," and depth):
            depth += {"{": 1, "}": -1, ",": 0}[token]
            pattern += {"{": "(?:", "}": ")", ",": "|"}[token]
        elif len(token) > 1 and token[0] == "[":
            negated = token[1] == "!"
            inside = token[2 if negated else 1 : -1].replace("\\", r"\\")
            pattern += f"[{'^' if negated else ''}{inside}]"
        else:
            pattern += re.escape(token[-1])
    return re.compile(pattern, re.DOTALL).fullmatch
