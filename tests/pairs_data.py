"""Small tar shards of pairs, written by the standard library."""

import io
import tarfile
from pathlib import Path

from PIL import Image


def picture(colour, *, size=(8, 8), format="JPEG"):
    """An encoded picture of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format)
    return buffer.getvalue()


def write_tar(path: Path, files, *, format=tarfile.PAX_FORMAT) -> Path:
    """A tar of (name, bytes) in order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def pair_files(numbers):
    """Pictures and captions of some rows."""
    for n in numbers:
        yield f"{n:04}.jpg", picture((n * 7 % 256, 0, 0))
        yield f"{n:04}.txt", f"caption {n}".encode()


def write_shards(folder: Path, *, rows=12, shards=3, split="train") -> Path:
    """Shards SPLIT-0.tar, ... with `rows` pairs together."""
    for shard in range(shards):
        numbers = range(rows * shard // shards, rows * (shard + 1) // shards)
        write_tar(folder / f"{split}-{shard}.tar", pair_files(numbers))
    return folder
