"""Fail where a test replaces or sets a private name of the package.

    python scripts/lint_tests.py tests

What a test has to vary is a parameter, or a value of a config object. Names that begin with an
underscore may change with every commit; a test that replaces one breaks without anything being
wrong, or goes on replacing what nothing reads any more. Found are:

    monkeypatch.setattr("keras_remote_airflow.core.x._NAME", ...)     also mock.patch("...")
    monkeypatch.setattr(x, "_name", ...)                              also delattr, patch.object
    monkeypatch.setattr(x._Class, "method", ...)
    x._NAME = ...                                                     also del, +=, setattr(x, ...)

An `x` that was imported from another package than ours is left alone, and so is `self`.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = "keras_remote_airflow"
REPLACERS = {"setattr", "__setattr__", "delattr", "patch", "object"}  # the last is patch.object


def find_replaced(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and name of each private name that the source of a test replaces."""
    tree = ast.parse(source)
    foreign = set(_foreign_names(tree)) | {"self"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _last_name(node.func) in REPLACERS:
            name = _replaced_by_call(node)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            name = _dotted(node)
        else:
            continue
        parts = name.split(".")
        is_private = any(part.startswith("_") and not part.startswith("__") for part in parts)
        if is_private and parts[0] not in foreign:
            yield node.lineno, name


def _foreign_names(tree: ast.AST) -> Iterator[str]:
    """Yield the names that the file imports from anywhere but the package and the tests."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if not _is_ours(alias.name):
                    yield (alias.asname or alias.name).partition(".")[0]
        elif isinstance(node, ast.ImportFrom) and not (node.level or _is_ours(node.module)):
            yield from (alias.asname or alias.name for alias in node.names)


def _is_ours(module: str | None) -> bool:
    return (module or "").partition(".")[0] == PACKAGE


def _replaced_by_call(call: ast.Call) -> str:
    """Return the dotted name that a call replaces, "" if it can't be told."""
    match call.args:
        case [ast.Constant(value=str(path)), *_]:
            return path if path.startswith(f"{PACKAGE}.") else ""
        case [target, ast.Constant(value=str(name)), *_]:
            return f"{_dotted(target)}.{name}"
    return ""


def _dotted(node: ast.expr) -> str:
    """Return an expression as a dotted name, with "?" for what is no name."""
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def _last_name(node: ast.expr) -> str:
    return _dotted(node).rpartition(".")[2]


def main() -> int:
    found = [
        f"{path}:{line}: replaces {name}, which is private: make it a parameter or a config value"
        for folder in sys.argv[1:]
        for path in sorted(Path(folder).rglob("*.py"))
        for line, name in find_replaced(path.read_text(encoding="utf-8"))
    ]
    print("\n".join(found) or "tests replace no private names")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
