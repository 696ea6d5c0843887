"""The data that is benchmarked, made once below one folder and reused.

    S        20,000 files of 4 KiB in 220 nested folders
    S5000    the first 5,000 of them; S2000 and S500 likewise (hard links, for slow contenders)
    M        200 files of 4 MiB
    L        one file of 2 GiB
    W        scikit-learn's 1,797 digits as 8x8 PNG images, one folder per digit
    N10k     10,000 names of one 16-byte file, 1,000 to a folder; N100k and N1M likewise
             (hard links: what they are for is counting files, not reading bytes)

The quick scale has the same shapes and is made in a second. A corpus is made aside and renamed
into place, so one that exists is whole.
"""

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
# Long past, so that a stat index has no reason to doubt what it saw of a file.
_MTIME = 1_600_000_000


@dataclass(frozen=True)
class Corpus:
    """Files on disk.

    Attributes:
        name: as above.
        path: the folder, or the one file.
        files: how many there are.
        bytes: their total size.
    """

    name: str
    path: str
    files: int
    bytes: int


@dataclass(frozen=True)
class Scale:
    """How large the corpora are: (files, bytes per file), or the number of names or images."""

    name: str
    small: tuple[int, int]
    small_parts: dict[str, int]
    medium: tuple[int, int]
    large: int
    images: int
    names: dict[str, int]


FULL = Scale(
    "full",
    small=(20_000, 4 * KIB),
    small_parts={"S5000": 5_000, "S2000": 2_000, "S500": 500},
    medium=(200, 4 * MIB),
    large=2 * GIB,
    images=1_797,
    names={"N10k": 10_000, "N100k": 100_000, "N1M": 1_000_000},
)
QUICK = Scale(
    "quick",
    small=(1_000, 4 * KIB),
    small_parts={"S5000": 300, "S2000": 100, "S500": 50},
    medium=(10, 4 * MIB),
    large=64 * MIB,
    images=200,
    names={"N10k": 1_000, "N100k": 10_000, "N1M": 50_000},
)


def make(name: str, scale: Scale, root: Path) -> Corpus:
    """Return the corpus called `name`, making it below `root` unless it is there."""
    path = root / scale.name / name
    if name == "L":
        path = path / "large.bin"
    if not path.exists():
        makers: dict[str, Callable[[Path], None]] = {
            "S": lambda aside: _small(aside, *scale.small),
            "M": lambda aside: _medium(aside, *scale.medium),
            "L": lambda aside: _large(aside, scale.large),
            "W": lambda aside: _images(aside, scale.images),
        }
        if name in scale.small_parts:
            whole = Path(make("S", scale, root).path)
            makers[name] = lambda aside: _part(aside, whole, scale.small_parts[name])
        if name in scale.names:
            makers[name] = lambda aside: _names(aside, scale.names[name])
        _put_in_place(makers[name], root / scale.name / name)
    if name in scale.names:  # known without a look at a million files
        return Corpus(name, str(path), scale.names[name], 16 * scale.names[name])
    sizes = [path.stat().st_size] if path.is_file() else [f.stat().st_size for f in _files(path)]
    return Corpus(name, str(path), len(sizes), sum(sizes))


def _put_in_place(maker: Callable[[Path], None], folder: Path) -> None:
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    maker(aside)
    aside.rename(folder)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (_MTIME, _MTIME))


def _small(folder: Path, files: int, size: int) -> None:
    noise = random.Random("S")
    for number in range(files):
        hundred = number // 100
        name = f"part-{hundred // 10:02}/shard-{hundred % 10}/{number:05}.bin"
        _write(folder / name, noise.randbytes(size))


def _part(folder: Path, whole: Path, files: int) -> None:
    for source in _files(whole)[:files]:
        target = folder / source.relative_to(whole)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.hardlink_to(source)


def _medium(folder: Path, files: int, size: int) -> None:
    noise = random.Random("M")
    for number in range(files):
        _write(folder / f"shard-{number:03}.bin", noise.randbytes(size))


def _large(folder: Path, size: int) -> None:
    noise = random.Random("L")
    path = folder / "large.bin"
    with path.open("wb") as file:
        for _ in range(size // (16 * MIB)):
            file.write(noise.randbytes(16 * MIB))
    os.utime(path, (_MTIME, _MTIME))


def _images(folder: Path, images: int) -> None:
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for number, (pixels, label) in enumerate(
        zip(digits.images[:images], digits.target, strict=False)
    ):
        path = folder / str(label) / f"{number:04}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((pixels * 255 / 16).astype(np.uint8)).save(path)
        os.utime(path, (_MTIME, _MTIME))


def _names(folder: Path, names: int) -> None:
    for first in range(0, names, 1000):
        parent = folder / f"part-{first // 1000:04}"
        # A file has at most 65,000 names on ext4: each folder links to a file of its own.
        original = parent / f"{first:07}.txt"
        _write(original, b"%015d\n" % first)
        for number in range(first + 1, first + 1000):
            os.link(original, parent / f"{number:07}.txt")
