"""The content hash as keras-kinetic spells it: os.walk, no threads, no care for speed."""

import hashlib
import os


def files_in_order(root: str) -> list[tuple[str, bytes]]:
    """Return relative path and content of every file, in the order of the hash."""
    found = []
    for folder, folders, names in os.walk(root, followlinks=False):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(folder, name)
            with open(path, "rb") as file:
                found.append((os.path.relpath(path, root), file.read()))
    return found


def file_digest(relative: str, content: bytes) -> bytes:
    return hashlib.sha256(relative.encode() + b"\0" + content).digest()


def content_hash(path: str) -> str:
    """Return the two-level content hash of a file or directory."""
    if os.path.isdir(path):
        digests = b"".join(file_digest(*file) for file in files_in_order(path))
        return hashlib.sha256(b"dir:" + digests).hexdigest()
    with open(path, "rb") as file:
        digest = file_digest(os.path.basename(path), file.read())
    return hashlib.sha256(b"file:" + digest).hexdigest()
