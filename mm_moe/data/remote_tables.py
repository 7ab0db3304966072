"""Tables at HTTP addresses: which files a split has, and their rows, through `Remote`.

There is no listing over HTTP, so a user names the files: one address, or a folder's address and a
name for each split, in which `{000..011}` stands for a row of numbers. Parquet is read by ranges,
only the columns that are wanted; CSV and JSON lines from the start to the end. Every body's length
is checked, so a file that is cut off is an error and never a smaller data set.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from mm_moe.data.locate import FORMATS as TABLE_FORMATS
from mm_moe.data.locate import one_folder
from mm_moe.data.retrying import Remote
from mm_moe.data.web import is_http, shown_url
from mm_moe.errors import DataError

FORMATS = {**TABLE_FORMATS, ".tsv": "tsv"}
NUMBERS = re.compile(r"\{(\d+)\.\.(\d+)\}")
MAX_FILES = 100_000
CSV_ROWS = 10_000  # as many as `datasets` parses at once, so that types are guessed alike
PARQUET_ROWS = 32


@dataclass(frozen=True)
class RemoteTables:
    """The table files of a data set at HTTP addresses.

    Attributes:
        files: split -> addresses, in order.
        kind: one of the values of `FORMATS`.
        remote: what reads them.
    """

    files: dict[str, list[str]]
    kind: str
    remote: Remote

    def stream(self, split: str, columns: Sequence[str] | None = None) -> datasets.IterableDataset:
        """Raw rows of a split; of Parquet, no other column is downloaded."""
        stream: datasets.IterableDataset = datasets.IterableDataset.from_generator(
            _rows,
            gen_kwargs={
                "urls": self.files[split],  # a list: these are the shards that a shuffle mixes
                "kind": self.kind,
                "columns": tuple(columns or ()),
                "remote": self.remote,
            },
        )
        return stream.select_columns(list(columns)) if columns else stream

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that were named."""
        return tuple(self.files)

    def columns(self, split: str) -> list[str]:
        """Names of a split's columns."""
        return self._columns[split]

    @cached_property
    def _columns(self) -> dict[str, list[str]]:
        if self.kind == "parquet":
            return {split: self._schema(files[0]).names for split, files in self.files.items()}
        return {split: list(next(iter(self.stream(split)), {})) for split in self.files}

    def class_names(self, split: str, column: str) -> tuple[str, ...] | None:
        """Names of a ClassLabel column, which a Parquet file may declare."""
        if self.kind != "parquet":
            return None
        feature = datasets.Features.from_arrow_schema(self._schema(self.files[split][0]))[column]
        return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None

    def folder(self, split: str) -> str:
        """The address of the folder of a split's tables, which relative image paths start from.

        Raises:
            DataError: they lie in several.
        """
        parts = map(urlsplit, self.files[split])
        folders = {p._replace(path=str(PurePosixPath(p.path).parent)).geturl() for p in parts}
        return one_folder(folders, split=split)

    def size(self, split: str) -> int | None:
        """Rows of a split, from Parquet's footers; None where only a full pass would tell."""
        return self._sizes[split] if self.kind == "parquet" else None

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return {split: sum(map(self._count, files)) for split, files in self.files.items()}

    def _count(self, url: str) -> int:
        with self.remote.open(url) as file:
            return pq.read_metadata(file).num_rows

    def _schema(self, url: str) -> pa.Schema:
        with self.remote.open(url) as file:
            return pq.read_schema(file)

    def fingerprint(self) -> str:
        """sha256 over addresses (without secrets), lengths and ETags."""
        digest = hashlib.sha256()
        for split, files in sorted(self.files.items()):
            for url in files:
                about = self.remote.about(url)
                digest.update(f"{split} {shown_url(url)} {about.size} {about.tag}\n".encode())
        return digest.hexdigest()


def beside(folder: str, name: str) -> str:
    """The place of a file that a table in `folder` names by a relative path."""
    if not is_http(folder):
        return str(Path(folder) / name)
    parts = urlsplit(folder)
    return parts._replace(path=str(PurePosixPath(parts.path) / name.lstrip("/"))).geturl()


def locate_remote(place: str, *, wanted: dict[str, str | None], remote: Remote) -> RemoteTables:
    """The tables that an address and the names of splits mean.

    Args:
        place: the address of a table, or of the folder that the tables of all splits lie in.
        wanted: split -> file name below the folder.
        remote: what reads them.

    Raises:
        DataError: no address, no table is named, several formats, or a name that is none.
    """
    try:
        parts = urlsplit(place)
    except ValueError as error:
        raise DataError(f"{shown_url(place)} is no address of the web ({error}).") from None
    names = {split: name for split, name in wanted.items() if name}
    path = PurePosixPath(parts.path)
    if path.suffix.lower() in FORMATS:
        names = {"train": path.name, **names}
        path = path.parent
    if not names:
        raise DataError(
            f"{shown_url(place)} is no table ({', '.join(FORMATS)}), and no folder can be listed "
            'over HTTP; name the files, for example --dataset_options \'{"train": '
            '"train-{000..009}.parquet", "test": "test.parquet"}\'.'
        )
    files = {
        split: [parts._replace(path=str(path / one)).geturl() for one in expand(name)]
        for split, name in names.items()
    }
    kinds = {FORMATS.get(PurePosixPath(name).suffix.lower(), name) for name in names.values()}
    if len(kinds) > 1 or not kinds <= set(FORMATS.values()):
        raise DataError(
            f"the files of {shown_url(place)} must be tables of one format "
            f"({', '.join(FORMATS)}), not {', '.join(sorted(kinds))}."
        )
    return RemoteTables(files, kinds.pop(), remote)


def expand(name: str) -> list[str]:
    """A file name with {00..11} in it as all the names that it stands for.

    Raises:
        DataError: more than 100,000 of them, or none.
    """
    found = NUMBERS.search(name)
    if not found:
        return [name]
    first, last = int(found[1]), int(found[2])
    if not 0 <= last - first < MAX_FILES:
        raise DataError(
            f"{name!r} names {last - first + 1:,} files; it must be 1 to {MAX_FILES:,}."
        )
    head, tail, width = name[: found.start()], name[found.end() :], len(found[1])
    return [f"{head}{n:0{width}}{rest}" for n in range(first, last + 1) for rest in expand(tail)]


def _rows(
    urls: list[str], kind: str, columns: tuple[str, ...], remote: Remote
) -> Iterator[dict[str, Any]]:
    """The rows of some tables, one after the other."""
    for url in urls:
        with remote.open(url) as file:
            if kind == "parquet":
                yield from _parquet_rows(file, columns)
            elif kind == "json":
                yield from _json_rows(file, url)
            else:
                yield from _csv_rows(file, "," if kind == "csv" else "\t")


def _parquet_rows(file: BinaryIO, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    batches = pq.ParquetFile(file).iter_batches(
        PARQUET_ROWS, columns=list(columns) or None, use_threads=False
    )
    for batch in batches:
        yield from batch.to_pylist()


def _csv_rows(file: BinaryIO, separator: str) -> Iterator[dict[str, Any]]:
    with pd.read_csv(file, sep=separator, chunksize=CSV_ROWS) as chunks:
        for chunk in chunks:
            yield from pa.Table.from_pandas(chunk, preserve_index=False).to_pylist()


def _json_rows(file: BinaryIO, url: str) -> Iterator[dict[str, Any]]:
    """JSON lines, or one list of objects."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig")
    try:
        first = next((line for line in text if line.strip()), "")
        is_list = first.lstrip().startswith("[")
        values = json.loads(first + text.read()) if is_list else _lines(first, text)
        for value in values:
            if not isinstance(value, dict):
                raise DataError(f"{shown_url(url)} holds JSON that is no row of named values.")
            yield value
    finally:
        text.detach()  # the file is its opener's


def _lines(first: str, text: io.TextIOWrapper) -> Iterator[Any]:
    return (json.loads(line) for line in itertools.chain([first], text) if line.strip())
