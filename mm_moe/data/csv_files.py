"""CSV files that are closed when their stream ends or is dropped.

`datasets` hands pandas an open file that nobody closes: it stays open until the garbage collector
finds it, with a ResourceWarning, once for each stream. Here it is opened around the reading.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import datasets
from datasets.packaged_modules.csv.csv import Csv


def close_files(builder: datasets.DatasetBuilder) -> None:
    """Let a builder of local CSV files close them; others stay as they are."""
    if isinstance(builder, Csv):
        builder._generate_tables = partial(_tables, builder)  # type: ignore[method-assign]


def _tables(
    builder: Csv, base_files: list[Any], files_iterables: Iterable[Iterable[str]]
) -> Iterator[Any]:
    """The library's own tables, from files that we open."""
    opened = [_opened(files) for files in files_iterables]
    return Csv._generate_tables(builder, base_files, opened)


def _opened(files: Iterable[str]) -> Iterator[Any]:
    """Each file while it is being read; dropping the iterator closes the last one."""
    for path in files:
        with open(path, "rb") as file:
            yield file
