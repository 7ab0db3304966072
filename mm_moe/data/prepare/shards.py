"""Parquet shards of one split. Small row groups and several files, so that streams can shuffle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from mm_moe.data.prepare.check import CheckedRow
from mm_moe.data.prepare.raw import IMAGES, TEXTS, RawDataSet
from mm_moe.data.reading import file_sha256
from mm_moe.data.schema import MULTI_LABEL, SINGLE_LABEL, SURVIVAL, VQA

ROWS_PER_FILE = 2000
ROWS_PER_GROUP = 100


def features(raw: RawDataSet) -> datasets.Features:
    """The columns; as `datasets` knows them, so that its viewers show the pictures."""
    kinds: dict[str, Any] = {
        IMAGES: datasets.Image(decode=False),
        TEXTS: datasets.Value("string"),
    }
    labels: dict[str, Any] = {
        SINGLE_LABEL: datasets.Value("int64"),
        MULTI_LABEL: datasets.List(datasets.Value("int8")),
        SURVIVAL: datasets.List(datasets.Value("float32")),
    }
    if raw.task == VQA:  # {class: share}, as wide as the vocabulary if it were dense
        share = {"class": datasets.Value("int32"), "share": datasets.Value("float64")}
        labels[MULTI_LABEL] = datasets.List(share)
    return datasets.Features(
        {
            "id": datasets.Value("string"),
            "group": datasets.Value("string"),
            "mask_key": datasets.Value("string"),
            **{name: kinds.get(kind, datasets.Value("binary")) for name, kind in raw.kinds.items()},
            "label": labels.get(raw.problem_type, datasets.Value("float32")),
        }
    )


class SplitWriter:
    """Writes the rows of one split, as a context.

    Attributes:
        num_rows: rows written.
        files: after the end, a record {"name", "rows", "bytes", "sha256"} of each shard.
    """

    def __init__(self, folder: Path, split: str, *, raw: RawDataSet) -> None:
        self.folder, self.split, self.kinds = folder, split, dict(raw.kinds)
        self.schema = features(raw).arrow_schema
        self.num_rows = 0
        self.files: list[dict[str, Any]] = []
        self._rows: list[dict[str, Any]] = []
        self._writer: pq.ParquetWriter | None = None
        self._in_file = 0

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self._flush()
        self._end_file()

    def add(self, row: CheckedRow) -> None:
        """Append one good row."""
        cells = {name: _cell(row.payload.get(name), kind) for name, kind in self.kinds.items()}
        keys = {"id": row.id, "group": row.group, "mask_key": row.mask_key}
        self._rows.append({**keys, **cells, "label": _label(row.label)})
        self.num_rows += 1
        if len(self._rows) >= ROWS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        if not self._rows:
            return
        if self._writer is None:
            path = self.folder / f"{self.split}-{len(self.files):05d}.parquet"
            self._writer = pq.ParquetWriter(path, self.schema)
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self.schema))
        self._in_file += len(self._rows)
        self._rows.clear()
        if self._in_file >= ROWS_PER_FILE:
            self._end_file()

    def _end_file(self) -> None:
        if self._writer is None:
            return
        self._writer.close()
        path = Path(self.folder, f"{self.split}-{len(self.files):05d}.parquet")
        record = {"name": path.name, "rows": self._in_file, "bytes": path.stat().st_size}
        self.files.append({**record, "sha256": file_sha256(path)})
        self._writer, self._in_file = None, 0


def _label(label: Any) -> Any:
    """A label as its cell: a map of shares as a list of pairs."""
    if not isinstance(label, dict):
        return label
    return [{"class": index, "share": share} for index, share in label.items()]


def _cell(value: Any, kind: str) -> Any:
    """A payload as the cell of its column."""
    if value is None or kind == TEXTS:
        return value
    return {"bytes": value, "path": None} if kind == IMAGES else value.tobytes()
