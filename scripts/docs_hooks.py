"""Hooks of mkdocs: pages at the repository's root, and links that are written for the forge.

In the repository a page links to files relative to itself, as forges show them. The site has the
pages alone, README.md as its index. So links to pages become links of the site; links to other
files lead to the repository, or are plain text if its address (`repo_url`) isn't known.
"""

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

REPOSITORY = Path(__file__).resolve().parent.parent
# Pages of the site that lie outside docs/.
ROOT_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
}
# A warning of a logger below mkdocs' own fails a strict build.
_log = logging.getLogger("mkdocs.hooks.links")
_FENCE_OR_LINK = re.compile(
    r"(?P<fence>^```.*?^```$)|(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)",
    re.MULTILINE | re.DOTALL,
)


def on_files(files: Files, config: Any) -> Files:
    for name, uri in ROOT_PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(REPOSITORY / name)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    source = Path(page.file.abs_src_path)

    def replace(match: re.Match[str]) -> str:
        target = match["target"]
        if match["fence"] or "://" in target or target.startswith("#"):
            return match[0]
        path, _, fragment = target.partition("#")
        linked = (source.parent / path).resolve()
        if not linked.exists():
            _log.warning("%s links to %s, which does not exist", source, target)
            return match[0]
        name = linked.relative_to(REPOSITORY).as_posix()
        uri = ROOT_PAGES.get(name, name.removeprefix("docs/"))
        if files.get_file_from_path(uri) is not None:
            url = posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".")
        elif config.repo_url:
            kind = "tree" if linked.is_dir() else "blob"
            url = f"{config.repo_url.rstrip('/')}/{kind}/main/{name}"
        else:
            return match["text"]
        return f"{match['image']}[{match['text']}]({url}{'#' + fragment if fragment else ''})"

    return _FENCE_OR_LINK.sub(replace, markdown)
