"""Stored missing tables that a run is given: which split each is for, and that it fits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mm_moe.data.schema import DataSource
from mm_moe.data.table import MissingTable, import_legacy_table
from mm_moe.errors import ConfigError

LEGACY_ENDING = ".pt"
# An old table is named by its arrow file: mmimdb_train_missing_both_07.pt
LEGACY_SPLIT = re.compile(r"(?:^|_)(train|dev|val|validation|test)_missing_")
OUR_SPLIT = {"dev": "validation", "val": "validation"}


def split_and_file(word: str, source: DataSource) -> tuple[str | None, Path]:
    """The split and the file of FILE or SPLIT=FILE; no split where the file has to say it.

    Raises:
        DataError: the data have no such split.
    """
    name, equals, path = word.partition("=")
    if equals and not Path(word).exists():
        return source.check_split(name), Path(path)
    return None, Path(word)


def read_tables(
    words: Sequence[str], *, source: DataSource, only: Sequence[str] | None = None
) -> dict[str, MissingTable]:
    """The tables of a run by split, each checked against the samples of its split.

    Args:
        words: FILE or SPLIT=FILE: a table of ours (JSON), or an old `.pt` vector in the order of
            the split.
        source: the data set.
        only: splits that are asked for; a word that names another one is not read.

    Raises:
        ConfigError: no split is named, or one is named twice.
        DataError: a file that is no table, was changed, or does not fit data and split.
    """
    tables: dict[str, MissingTable] = {}
    for word in words:
        split, path = split_and_file(word, source)
        if split is not None and only is not None and split not in only:
            continue
        split, table = _read(path, split, source)
        if split in tables:
            raise ConfigError(
                f"--missing_table {word!r} is a second table for the split {split!r}; keep one."
            )
        tables[split] = table
    return tables


def _read(path: Path, split: str | None, source: DataSource) -> tuple[str, MissingTable]:
    """A table and its split."""
    if path.suffix == LEGACY_ENDING:
        named = LEGACY_SPLIT.search(path.name)
        split = _known_split(split or (named and OUR_SPLIT.get(named[1], named[1])), path, source)
        keys = mask_keys(source, split)
        table = import_legacy_table(path, ids=keys)
    else:
        table = MissingTable.load(path)
        made_for = table.origin.get("dataset", source.name)
        if made_for != source.name:
            raise ConfigError(
                f"--missing_table {str(path)!r} was made for the data set {made_for!r}, "
                f"this is {source.name!r}; take a table of its own."
            )
        split = _known_split(split or table.origin.get("split"), path, source)
        keys = mask_keys(source, split)
    table.check(keys, source.modalities, what=f"split {split!r} of {source.name!r}")
    return split, table


def _known_split(name: Any, path: Path, source: DataSource) -> str:
    if name not in source.splits():
        says = "names no split" if name is None else f"is for a split {name!r}"
        raise ConfigError(
            f"--missing_table {str(path)!r} {says}, {source.name!r} has "
            f"{', '.join(source.splits())}; write --missing_table {source.splits()[0]}={path}."
        )
    return name


def mask_keys(source: DataSource, split: str) -> list[str]:
    """What the masks of a split are keyed by, each once and in order."""
    return list(dict.fromkeys(sample.mask_key for sample in source.index(split)))


def words_of(
    words: Sequence[str], tables: Mapping[str, MissingTable], source: DataSource
) -> list[str]:
    """The words as SPLIT=FILE, so that whoever reads them need not open a file for its split."""
    paths = [split_and_file(word, source)[1] for word in words]
    return [f"{split}={path}" for split, path in zip(tables, paths, strict=True)]


def describe_tables(tables: Mapping[str, MissingTable]) -> dict[str, Any]:
    """What a run's record says of its tables: hash, origin and words by split."""
    return {
        split: {
            "sha256": table.table_hash(),
            "origin": table.origin,
            "samples": len(table.ids),
            "words": table.describe(),
        }
        for split, table in tables.items()
    }


def settle_tables(values: Any, typed: set[str], source: DataSource) -> dict[str, MissingTable]:
    """Read a run's tables; the training split's takes the place of a recipe's missing type.

    Raises:
        ConfigError: a typed missing type beside a table of the training split.
        MMMoEError: as `read_tables`.
    """
    tables = read_tables(values.missing_table, source=source)
    values.missing_table = words_of(values.missing_table, tables, source)
    if values.train_split in tables:
        contradicting = sorted(typed & {"missing_type", "missing_ratio"})
        if contradicting:
            raise ConfigError(
                f"--{contradicting[0]} contradicts --missing_table, which says what every sample "
                f"of the split {values.train_split!r} lacks; drop one."
            )
        values.missing_type, values.missing_ratio = "none", 0.0
    return tables
