"""The pages of the repository, taken apart."""

import re
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
# README.md comes first.
PAGES = [
    *sorted(REPOSITORY.glob("*.md"), key=lambda page: page.name != "README.md"),
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE_NAME = re.compile(r"# ([\w./-]+\.py)\n")
# What a page's example for Airflow 3 says in a comment to write on Airflow 2.
_AIRFLOW_2 = re.compile(r"^( *)from airflow\.sdk import .*?  # Airflow 2: (from .*)$", re.MULTILINE)
_COMMAND = re.compile(r"^\$ ", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: what follows the opening fence.
        text: its lines, as this Airflow wants them.
        line: number of its first line in the page, from 0.
    """

    language: str
    text: str
    line: int

    @property
    def file_name(self) -> str | None:
        """Where the page says to save it: in a comment on its first line."""
        match = _FILE_NAME.match(self.text)
        return match[1] if match else None

    @property
    def is_dag_file(self) -> bool:
        return self.language == "python" and re.search(r"^@dag\b", self.text, re.M) is not None


def for_this_airflow(code: str) -> str:
    """Return the code with imports from where this Airflow has the names."""
    is_airflow_2 = version("apache-airflow").startswith("2.")
    return _AIRFLOW_2.sub(r"\1\2", code) if is_airflow_2 else code


def read_blocks(page: Path) -> list[Block]:
    """Return a page's fenced blocks."""
    text = page.read_text(encoding="utf-8")
    blocks = []
    for match in _FENCE.finditer(text):
        line = text.count("\n", 0, match.start(2))
        blocks.append(Block(match[1], for_this_airflow(match[2]), line))
    return blocks


def read_commands(block: Block) -> list[tuple[str, str]]:
    """Return a console block's commands, each with the output that the page shows."""
    commands = []
    for part in _COMMAND.split(block.text)[1:]:
        end = re.search(r"(?<!\\)\n", part)
        assert end, part
        commands.append((part[: end.start()], part[end.end() :].strip("\n")))
    return commands


def read_prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def read_headings(page: Path) -> list[str]:
    return re.findall(r"^#+ (.*)$", read_prose(page), re.MULTILINE)


def anchor(heading: str) -> str:
    """Return what GitHub makes of a heading for links to it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
