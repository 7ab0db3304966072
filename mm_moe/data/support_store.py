"""The payloads of supports by row number, without holding the data set in memory.

A data set with random access of its own (`DataSource.samples_at`) serves them itself. Of any other
one a single pass over the training split writes an Arrow file, which is mapped into memory; the
same pass finds out what each row has. The file holds payloads and hashed groups, no id; it is
data of training rows like the data set itself, and belongs where that may lie.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa

from mm_moe.batch import PackedArray, Sample, pattern_index
from mm_moe.data.captions import Captions
from mm_moe.data.collate import Missing, presence
from mm_moe.data.reading import reading
from mm_moe.data.schema import DataSource
from mm_moe.data.support import SupportIndex, group_code
from mm_moe.errors import DataError

CHUNK = 1024  # rows of every record batch but the last
KIND = "/kind"  # the column beside a modality's that says what its bytes are


class SupportStore(Protocol):
    """Where the payloads of training rows come from."""

    def values(self, modality: str, rows: Sequence[int]) -> list[Any]:
        """The raw values of one modality, for rows of the split that have it."""


class OwnAccess:
    """The rows of a data set with random access of its own."""

    def __init__(self, source: DataSource, split: str) -> None:
        self.source, self.split = source, split

    def values(self, modality: str, rows: Sequence[int]) -> list[Any]:
        """As the data set gives them."""
        samples = self.source.samples_at(self.split, rows)
        assert samples is not None  # `open_supports` asked
        return [sample.payload[modality] for sample in samples]


class ArrowStore:
    """The rows of a file that `write_store` wrote, mapped into memory.

    The file is an Arrow stream as `datasets` writes them (`Dataset.from_file` opens it, too); its
    record batches are of one size, so a row is found without a search.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    @cached_property
    def _columns(self) -> dict[str, list[pa.Array]]:
        """Column -> its record batches; kept, since a list of them is made anew each time."""
        with reading(str(self.path)):
            table = pa.ipc.open_stream(pa.memory_map(str(self.path))).read_all()
        return {name: table[name].chunks for name in table.column_names}

    def values(self, modality: str, rows: Sequence[int]) -> list[Any]:
        """What the file holds of these rows; no other column is touched."""
        if not rows:
            return []
        kinds, contents = self._columns[modality + KIND], self._columns[modality]
        found = [divmod(row, CHUNK) for row in rows]
        return [_decoded(kinds[c][r].as_py(), contents[c][r].as_py()) for c, r in found]


def open_supports(
    source: DataSource, *, split: str, missing: Missing | None
) -> tuple[SupportIndex, SupportStore] | None:
    """Index and store of a data set with random access; None for one without.

    Raises:
        DataError: as the data set's stream.
    """
    if source.samples_at(split, []) is None:
        return None
    chunks = _chunks(source, split, missing)
    parts = [(pattern_N, group_N) for _, pattern_N, group_N in chunks]
    return _index(parts, source), OwnAccess(source, split)


def write_store(
    source: DataSource,
    *,
    split: str,
    missing: Missing | None,
    folder: Path,
    options: Mapping[str, Any] | None = None,
) -> tuple[SupportIndex, SupportStore]:
    """Index and store of any data set, from a file that is written where it is not there yet.

    One process calls it first; the others find its file.

    Args:
        source: the data set.
        split: whose rows are lent.
        missing: what is taken from them before.
        folder: where the file lies.
        options: that the data set was opened with: others may show other rows of the same content.

    Raises:
        DataError: as the data set's stream; the file cannot be written; a payload of a kind that
            cannot be kept.
    """
    key = store_key(source, split=split, missing=missing, options=options)
    path = folder / f"{split}-{key[:16]}.arrow"
    about = path.with_suffix(".npz")
    if not (path.is_file() and about.is_file()):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _write(source, split=split, missing=missing, path=path, about=about)
        except OSError as error:
            raise DataError(
                f"the supports cannot be written to {folder}: {type(error).__name__}; they take "
                "about the size of the training split."
            ) from error
    try:
        with reading(str(about)), np.load(about, allow_pickle=False) as file:
            index = _index([(file["pattern"], file["group"])], source)
    except (BadZipFile, KeyError, EOFError) as error:
        raise DataError(f"{about} is damaged; delete {folder}, and it is made anew.") from error
    return index, ArrowStore(path)


def store_key(
    source: DataSource,
    *,
    split: str,
    missing: Missing | None,
    options: Mapping[str, Any] | None = None,
) -> str:
    """sha256 of what decides the file's content: data, options, split, modalities, and the mask.

    A fingerprint is of the files alone in most data sets; options choose columns and rows of them.
    """
    what = [source.name, source.fingerprint(), split, list(source.modalities), repr(missing)]
    return hashlib.sha256(json.dumps([*what, options or {}], sort_keys=True).encode()).hexdigest()


def _write(
    source: DataSource, *, split: str, missing: Missing | None, path: Path, about: Path
) -> None:
    """Write both files under other names, then put them in place: a half one is never met."""
    fields = [(name, pa.large_binary()) for name in source.modalities]
    schema = pa.schema([*fields, *((name + KIND, pa.string()) for name in source.modalities)])
    half = path.with_suffix(f".{os.getpid()}.tmp")
    parts = []
    try:
        with pa.OSFile(str(half), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            half.chmod(0o600)
            for samples, pattern_N, group_N in _chunks(source, split, missing):
                writer.write_batch(_record_batch(samples, pattern_N, source.modalities, schema))
                parts.append((pattern_N, group_N))
        patterns, groups = (np.concatenate(column) for column in zip(*parts, strict=True))
        with about.open("wb") as out:
            about.chmod(0o600)
            np.savez(out, pattern=patterns, group=groups)
        half.replace(path)
    finally:
        half.unlink(missing_ok=True)


def _record_batch(
    samples: list[Sample], pattern_N: np.ndarray, modalities: Sequence[str], schema: pa.Schema
) -> pa.RecordBatch:
    """The payloads of rows, without what the mask took."""
    columns: dict[str, list[Any]] = {name: [] for name in schema.names}
    for sample, pattern in zip(samples, pattern_N.tolist(), strict=True):
        for m, name in enumerate(modalities):
            kept = pattern >> m & 1
            kind, content = _encoded(sample.payload[name], name) if kept else (None, None)
            columns[name].append(content)
            columns[name + KIND].append(kind)
    return pa.RecordBatch.from_pydict(columns, schema=schema)


def _chunks(
    source: DataSource, split: str, missing: Missing | None
) -> Iterator[tuple[list[Sample], np.ndarray, np.ndarray]]:
    """Samples in the split's order, with the patterns that the mask leaves and group codes."""
    with reading(f"split {split!r} of {source.name!r}"):
        samples = map(source.to_sample, source.stream(split))
        while chunk := list(itertools.islice(samples, CHUNK)):
            left_BM = presence(chunk, modalities=source.modalities, missing=missing)
            codes = np.array([group_code(sample.group_key) for sample in chunk], np.int64)
            yield chunk, pattern_index(left_BM).numpy().astype(np.uint32), codes


def _index(parts: list[tuple[np.ndarray, np.ndarray]], source: DataSource) -> SupportIndex:
    if not parts:
        raise DataError(f"the training split of {source.name!r} has no row to draw supports from.")
    patterns, groups = (np.concatenate(column) for column in zip(*parts, strict=True))
    return SupportIndex(patterns, groups, num_modalities=len(source.modalities))


def _encoded(value: Any, modality: str) -> tuple[str, bytes]:
    """A raw value as bytes, and what they are. Of several captions the first is kept."""
    if isinstance(value, bytes):
        return "bytes", value
    if isinstance(value, str | Captions):
        return "text", (value.first if isinstance(value, Captions) else value).encode()
    if isinstance(value, PackedArray):
        return json.dumps(["packed", value.dtype, value.shape]), value.content
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise DataError(
            f"a payload of {modality!r} is a {type(value).__name__}, which cannot be kept as a "
            "support; give the data set a `samples_at`, or payloads of bytes, text or numbers."
        )
    return json.dumps(["array", array.dtype.str, array.shape]), array.tobytes()


def _decoded(kind: str, content: bytes) -> Any:
    if kind == "bytes":
        return content
    if kind == "text":
        return content.decode()
    what, dtype, shape = json.loads(kind)
    if what == "packed":
        return PackedArray(content, dtype, tuple(shape))
    return np.frombuffer(content, dtype=dtype).reshape(shape)
