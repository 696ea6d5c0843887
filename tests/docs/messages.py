"""Every message this package fails with or warns of, read from its source.

A message is what an error class of `core.errors` (or Airflow's, or a helper that wraps them) is
called with, or a logger's `warning`. What only a run can fill in shows as "…".
"""

import ast
import re
from itertools import product
from pathlib import Path

import keras_remote_airflow
from keras_remote_airflow.core import errors

ROOT = Path(keras_remote_airflow.__file__).parent
# Besides our own classes: those of Airflow and Python that end a task, and the helper that wraps a
# text into an error. RetryableError is left out: its text only ever shows inside "gave up after". A
# RefusedError shows in front of the name of what was refused.
_RAISERS = {name for name in vars(errors) if name.endswith("Error")} | {
    "AirflowFailException",
    "AirflowSensorTimeout",
    "AirflowSkipException",
    "BlockingIOError",
    "ImportError",
    "OSError",
    "RefusedError",
    "SystemExit",
    "_wrong",
    "os_error",
    "warning",
}
# Errors of the system have their number first.
_NUMBERED = {"BlockingIOError", "OSError", "os_error"}

# Texts that end a message and stand in another place than where it is raised.
ENDINGS = {
    "Waited … s: …": [  # CacheSensor: what its trigger or resume_execution says
        "no dataset appeared. Check bucket, namespace and layout: …",
        "no look succeeded (… failed), so the dataset may be there: …. The last failure: …",
        "the last … of … looks failed, so the dataset may be there: …. The last failure: …",
        "no triggerer answered; check that one is running, or pass deferrable=False",
    ]
}


# Functions that return a message for others to raise.
_RETURNED_BY = {"missing_requirement"}


def read_messages() -> dict[str, str]:
    """Return each message's text and where it stands."""
    found: dict[str, str] = {}
    for path in sorted(ROOT.rglob("*.py")):
        # The local server answers as Cloud Storage does; its words are not ours.
        if "testing" in path.relative_to(ROOT).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            for message in _messages_in(node):
                where = f"{path.relative_to(ROOT.parent)}:{message.lineno}"
                for text in _texts(message):
                    text = re.sub(r"%[\d.]*[sdfr]", "…", text)  # what a logger fills in
                    if text.strip("… .:"):
                        found |= dict.fromkeys(_whole(text), where)
    return found


def _messages_in(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.Call) and node.args and _name(node.func) in _RAISERS:
        return [node.args[_name(node.func) in _NUMBERED and len(node.args) > 1]]
    if isinstance(node, ast.FunctionDef) and node.name in _RETURNED_BY:
        returns = [inner for inner in ast.walk(node) if isinstance(inner, ast.Return)]
        return [
            inner.value for inner in returns if isinstance(inner.value, ast.JoinedStr | ast.BinOp)
        ]
    return []


def _whole(text: str) -> list[str]:
    return (
        [text.removesuffix("…") + ending for ending in ENDINGS[text]] if text in ENDINGS else [text]
    )


def read_texts() -> list[str]:
    """Return every text in the package's source: messages, and what they are put together of."""
    return [
        text
        for path in sorted(ROOT.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant | ast.JoinedStr)
        for text in _texts(node)
    ]


def _name(function: ast.expr) -> str:
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def _texts(node: ast.expr) -> list[str]:
    """Return what a string expression can come to: one text for each way through its ifs."""
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.JoinedStr):
        return ["".join(parts) for parts in product(*map(_texts, node.values))]
    if isinstance(node, ast.BinOp):
        return ["".join(parts) for parts in product(_texts(node.left), _texts(node.right))]
    if isinstance(node, ast.IfExp):
        return _texts(node.body) + _texts(node.orelse)
    return ["…"]
