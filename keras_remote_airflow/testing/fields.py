"""Partial responses: the `fields` parameter.

https://cloud.google.com/storage/docs/json_api#partial-response: a comma-separated list of
selectors, each a name, a path `a/b`, a name with sub-selectors `a(b,c)`, or `*`.
"""

import functools
from typing import Any

# A name to what is wanted below it; an empty tree means everything.
Tree = dict[str, Any]


@functools.lru_cache(maxsize=128)
def parse_fields(text: str) -> Tree:
    """Parse a selector list.

    Raises:
        ValueError: it is malformed.
    """
    tree, rest = _selectors(text, 0)
    if rest != len(text):
        raise ValueError(f"Invalid field selection {text}")
    return tree


def _selectors(text: str, at: int) -> tuple[Tree, int]:
    tree: Tree = {}
    while True:
        at = _selector(text, at, tree)
        if at >= len(text) or text[at] != ",":
            return tree, at
        at += 1


def _selector(text: str, at: int, tree: Tree) -> int:
    start = at
    while at < len(text) and text[at] not in ",/()":
        at += 1
    name = text[start:at].strip()
    if not name:
        raise ValueError(f"Invalid field selection {text}")
    below: Tree = {}
    if at < len(text) and text[at] == "/":
        at = _selector(text, at + 1, below)
    elif at < len(text) and text[at] == "(":
        below, at = _selectors(text, at + 1)
        if at >= len(text) or text[at] != ")":
            raise ValueError(f"Invalid field selection {text}")
        at += 1
    if name not in tree:
        tree[name] = below
    elif not tree[name] or not below:
        tree[name] = {}
    else:
        tree[name] = {**tree[name], **below}
    return at


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
