r"""Buckets and objects in a folder, so that they survive a restart.

    DIR/BUCKET/bucket.json                     settings of the bucket
    DIR/BUCKET/data/<32 hex digits>            the bytes of one generation
    DIR/BUCKET/meta/<SHA-256 of the name>.json the object: name, generation, file of its bytes, ...

No part of an object's name reaches the file system, so it cannot lead out of the folder, and
`a` and `a/b` can exist together. The bytes are written first; renaming the JSON file into place
is what makes the object exist. Bytes that no JSON file names are left over from a crash and are
removed at the next start.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .bodies import Body, FileBody, fill


class Folder:
    """The folder behind a server's state. A bucket's name was checked before it comes here."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def buckets(self) -> Iterator[dict[str, Any]]:
        for path in sorted(self._directory.glob("*/bucket.json")):
            fields: dict[str, Any] = json.loads(path.read_bytes())
            if fields["name"] == path.parent.name:
                yield fields

    def create_bucket(self, name: str) -> None:
        for part in ("data", "meta"):
            (self._directory / name / part).mkdir(parents=True, exist_ok=True)

    def save_bucket(self, name: str, fields: dict[str, Any]) -> None:
        fill(self._directory / name / "bucket.json", json.dumps(fields).encode())

    def delete_bucket(self, name: str) -> None:
        (self._directory / name / "bucket.json").unlink()
        shutil.rmtree(self._directory / name)

    def data_directory(self, bucket: str) -> Path:
        return self._directory / bucket / "data"

    def objects(self, bucket: str) -> Iterator[tuple[dict[str, Any], Body]]:
        """Every object's fields and bytes; removes what a crash left behind."""
        data = self.data_directory(bucket)
        named = set()
        for path in (self._directory / bucket / "meta").iterdir():
            if path.suffix != ".json":
                path.unlink()
                continue
            fields: dict[str, Any] = json.loads(path.read_bytes())
            # Only the last component: an edited JSON file must not lead out of the folder.
            file = data / Path(fields.pop("file")).name
            named.add(file.name)
            yield fields, FileBody(file)
        for file in data.iterdir():
            if file.name not in named:
                file.unlink()

    def save_object(self, bucket: str, name: str, fields: dict[str, Any], body: Body) -> None:
        if not isinstance(body, FileBody):
            raise TypeError(f"the bytes of {name!r} are not in a file")
        line = json.dumps({**fields, "file": body.path.name}).encode()
        fill(self._meta_path(bucket, name), line)

    def delete_object(self, bucket: str, name: str) -> None:
        self._meta_path(bucket, name).unlink()

    def _meta_path(self, bucket: str, name: str) -> Path:
        digest = hashlib.sha256(name.encode()).hexdigest()
        return self._directory / bucket / "meta" / f"{digest}.json"
