"""Opening files through `datasets`, with errors that a user can act on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import datasets
import pyarrow as pa
from datasets.exceptions import DatasetsError

from mm_moe.errors import DataError


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn the errors of reading `what` into a DataError that names it.

    Only the kind of error is told: parsers quote the row that they stumbled over.
    """
    try:
        yield
    except GeneratorExit:  # at the interpreter's end the names below may be gone already
        raise
    except (OSError, ValueError, pa.ArrowException, DatasetsError) as error:
        raise DataError(
            f"{what} cannot be read: {type(error).__name__}; check its files."
        ) from error


def stream_parquet(
    path: Path, *, columns: Sequence[str], filters: list[tuple[str, str, str]] | None = None
) -> datasets.IterableDataset:
    """Stream some columns of a Parquet file, nothing decoded.

    Args:
        path: the file.
        columns: the columns to read; no other is touched.
        filters: as pyarrow's, [("split", "==", "train")]; row groups that cannot match are skipped.
    """
    stream = datasets.load_dataset(
        "parquet",
        data_files=str(path),
        split="train",
        streaming=True,
        columns=list(columns),
        filters=filters,
    )
    return undecoded(stream)


def undecoded(stream: datasets.IterableDataset) -> datasets.IterableDataset:
    """The same stream with its images left as encoded bytes."""
    for column, feature in (stream.features or {}).items():
        if isinstance(feature, datasets.Image):
            stream = stream.cast_column(column, datasets.Image(decode=False))
    return stream


def image_payload(value: object) -> bytes | str | None:
    """What an undecoded image cell holds: its bytes, else where they are, else None."""
    if isinstance(value, dict):
        return value.get("bytes") or value.get("path") or None
    if isinstance(value, bytes | str):
        return value or None
    return None


def file_sha256(path: Path) -> str:
    """sha256 of a file's content."""
    digest = hashlib.sha256()
    with reading(str(path)), path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
