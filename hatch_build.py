"""Sets the project's addresses, which only a release knows.

    KERAS_REMOTE_REPOSITORY_URL=https://forge.example/owner/name uv build

Without the variable the package is built without them.
"""

import os

from hatchling.metadata.plugin.interface import MetadataHookInterface


class ProjectUrls(MetadataHookInterface):
    def update(self, metadata: dict[str, object]) -> None:
        repository = os.environ.get("KERAS_REMOTE_REPOSITORY_URL", "").rstrip("/")
        pages = {
            "Source": "",
            "Documentation": "/tree/main/docs",
            "Changelog": "/blob/main/CHANGELOG.md",
            "Issues": "/issues",
        }
        urls = {name: repository + path for name, path in pages.items()}
        metadata["urls"] = urls if repository else {}
