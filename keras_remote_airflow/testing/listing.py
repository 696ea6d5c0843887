"""Pages of a listing over sorted names.

Cloud Storage lists names in the order of their UTF-8 bytes, which is the order of code points,
which is how Python compares `str`.
"""

import base64
import binascii
import functools
import re
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

MAX_RESULTS = 1000  # https://cloud.google.com/storage/docs/json_api/v1/objects/list#parameters


@dataclass(frozen=True, slots=True)
class ListingQuery:
    """The parameters of a listing; `start` is inclusive, `end` exclusive."""

    prefix: str = ""
    delimiter: str = ""
    start: str = ""
    end: str = ""
    after: str = ""
    glob: str = ""
    include_trailing_delimiter: bool = False
    max_results: int = MAX_RESULTS


@dataclass(frozen=True, slots=True)
class ListingPage:
    """Names and common prefixes of one page; `next` is the token of the following one."""

    names: list[str]
    prefixes: list[str]
    next: str | None


def list_page(names: list[str], query: ListingQuery) -> ListingPage:
    """One page of a sorted list of names. Costs a bisection and the page, not the whole list."""
    found: list[str] = []
    prefixes: list[str] = []
    last = ""
    index = bisect_left(names, max(query.prefix, query.start, query.after))
    wanted = _glob_matcher(query.glob)
    while index < len(names):
        name = names[index]
        if not name.startswith(query.prefix) or (query.end and name >= query.end):
            break
        if name == query.after or (wanted is not None and not wanted(name)):
            index += 1
            continue
        common = ""
        if query.delimiter:
            at = name.find(query.delimiter, len(query.prefix))
            if at >= 0:
                common = name[: at + len(query.delimiter)]
        if common and query.after.startswith(common):
            # The page before ended inside this prefix, which it has shown.
            index = bisect_left(names, _successor(common), index)
            continue
        if len(found) + len(prefixes) >= query.max_results:
            return ListingPage(found, prefixes, encode_token(last))
        if common:
            prefixes.append(common)
            if query.include_trailing_delimiter and name == common:
                found.append(name)
            index = bisect_left(names, _successor(common), index)
            last = common
        else:
            found.append(name)
            index += 1
            last = name
    return ListingPage(found, prefixes, None)


def _successor(prefix: str) -> str:
    """The smallest text greater than everything that starts with `prefix`."""
    for index in range(len(prefix) - 1, -1, -1):
        if ord(prefix[index]) < 0x10FFFF:
            return prefix[:index] + chr(ord(prefix[index]) + 1)
    return chr(0x10FFFF) * (len(prefix) + 1024)


def encode_token(last: str) -> str:
    return base64.urlsafe_b64encode(b"after:" + last.encode()).decode()


def decode_token(token: str) -> str:
    """The last name or prefix of the page that gave this token.

    Raises:
        ValueError: no listing gave this token.
    """
    try:
        text = base64.urlsafe_b64decode(token.encode("ascii")).decode()
    except (binascii.Error, UnicodeError) as exc:
        raise ValueError(token) from exc
    if not text.startswith("after:"):
        raise ValueError(token)
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
