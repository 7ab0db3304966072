"""From a folder, a file or a Hub name to a `datasets` builder with its splits.

A folder with tables (Parquet, CSV, TSV, JSON lines) is read as tables, one format a folder; a
folder without is an image folder (class = subfolder, `metadata.csv` and the like for further
columns). No code of a data set is ever run.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import datasets

from mm_moe.data.csv_files import close_files
from mm_moe.data.reading import reading, undecoded
from mm_moe.errors import DataError

SPLITS = ("train", "validation", "test")
FORMATS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
}
# Words in a path that tell its split.
WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing"},
}
NOT_TABLES = {"metadata", "dataset_info", "dataset_infos", "dataset_dict", "state"}
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Located:
    """A data set that was found.

    Attributes:
        builder: the name of the `datasets` builder ("parquet"), or of the Hub data set.
        options: further arguments for `datasets.load_dataset_builder`.
        names: our split name -> its name in the source.
        files: our split name -> local table files; empty for image folders and the Hub.
        is_local: whether all of it lies on this machine.
    """

    builder: str
    options: dict[str, object]
    names: dict[str, str]
    files: dict[str, list[Path]]
    is_local: bool

    @cached_property
    def reader(self) -> datasets.DatasetBuilder:
        """The builder, whose `as_streaming_dataset` streams a split.

        Kept, so that a Hub data set stays at the commit at which it was first met.
        """
        with reading(f"the data set {self.builder!r}"):
            builder = datasets.load_dataset_builder(self.builder, **self.options)  # type: ignore[arg-type]
        if self.is_local:
            close_files(builder)
        return builder

    @property
    def splits(self) -> tuple[str, ...]:
        """Our names of the splits that were found."""
        return tuple(self.names)

    def columns(self, split: str) -> list[str]:
        """Names of a split's columns."""
        stream = self.stream(split)
        return list(stream.features or next(iter(stream.iter(batch_size=1)), {}))

    def stream(self, split: str, columns: list[str] | None = None) -> datasets.IterableDataset:
        """Raw rows of a split, images undecoded; of some columns, or of all."""
        stream = undecoded(self.reader.as_streaming_dataset(self.names[split]))
        return stream.select_columns(columns) if columns else stream

    def class_names(self, split: str, column: str) -> tuple[str, ...] | None:
        """Names of a ClassLabel column; its cells hold indices into them."""
        feature = (self.stream(split).features or {}).get(column)
        return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else None

    def folder(self, split: str) -> str:
        """The folder of a split's tables, which relative image paths start from.

        Raises:
            DataError: they lie in several.
        """
        return one_folder({str(file.parent) for file in self.files[split]}, split=split)


def one_folder(folders: Collection[str], *, split: str) -> str:
    """The only one of some folders.

    Raises:
        DataError: there are several.
    """
    first, *others = sorted(folders)
    if others:
        raise DataError(
            f"the tables of split {split!r} lie in {len(folders)} folders, so relative image paths "
            f"have no one start; put them in {first}."
        )
    return first


def locate(
    place: str, *, wanted: dict[str, str | None], config: str | None, revision: str | None
) -> Located:
    """Find the data behind a folder, file or Hub name.

    Args:
        place: what the user gave as `data_dir`.
        wanted: our split -> a file pattern, a split name, or None for the usual names.
        config: configuration of a Hub data set.
        revision: revision of a Hub data set.

    Raises:
        DataError: nothing there, mixed formats, or files that belong to no split.
    """
    path = Path(place).expanduser()
    if path.is_file():
        return _tables(path.parent, wanted={"train": path.name, **_patterns(wanted)})
    if path.is_dir():
        patterns = _patterns(wanted)
        if patterns or _table_files(path):
            return _tables(path, wanted=patterns or wanted)
        return _other("imagefolder", {"data_dir": str(path)}, wanted, is_local=True)
    if not HUB_NAME.fullmatch(place):
        raise DataError(f"there is no file or folder {place}.")
    return _other(place, {"name": config, "revision": revision}, wanted, is_local=False)


def _patterns(wanted: dict[str, str | None]) -> dict[str, str]:
    """Those of the wanted splits that are given as files, not as names."""
    return {
        split: value
        for split, value in wanted.items()
        if value and ("*" in value or Path(value).suffix.lower() in FORMATS)
    }


def _table_files(folder: Path) -> list[Path]:
    """Table files in a folder and its subfolders of one level."""
    found = [*folder.glob("*"), *folder.glob("*/*")]
    return sorted(
        file
        for file in found
        if file.suffix.lower() in FORMATS
        and file.stem not in NOT_TABLES
        and not file.name.startswith(".")
    )


def _tables(folder: Path, *, wanted: dict[str, str] | dict[str, str | None]) -> Located:
    """Table files dealt to their splits."""
    patterns = _patterns(dict(wanted))
    if patterns:
        files = {split: sorted(folder.glob(pattern)) for split, pattern in patterns.items()}
        for split, found in files.items():
            if not found:
                raise DataError(f"no file in {folder} matches {patterns[split]!r} ({split}).")
    else:
        files = _by_words(folder, dict(wanted))
    suffixes = sorted({file.suffix.lower() for found in files.values() for file in found})
    if len({(FORMATS[suffix], suffix == ".tsv") for suffix in suffixes}) > 1:
        raise DataError(
            f"{folder} holds tables in {len(suffixes)} formats ({', '.join(suffixes)}); say which "
            'to read by file patterns, for example train="train*.csv".'
        )
    options: dict[str, object] = {"data_files": {s: list(map(str, f)) for s, f in files.items()}}
    if suffixes == [".tsv"]:
        options["sep"] = "\t"
    return Located(FORMATS[suffixes[0]], options, {s: s for s in files}, files, is_local=True)


def _by_words(folder: Path, wanted: dict[str, str | None]) -> dict[str, list[Path]]:
    """Deal the table files of a folder to splits by the words of their paths."""
    words = {split: ({wanted[split]} if wanted.get(split) else WORDS[split]) for split in SPLITS}
    dealt: dict[str, list[Path]] = {}
    homeless = []
    for file in _table_files(folder):
        tokens = set(re.split(r"[^a-z0-9]+", str(file.relative_to(folder)).lower()))
        homes = [split for split in SPLITS if words[split] & tokens]
        if len(homes) == 1:
            dealt.setdefault(homes[0], []).append(file)
        else:
            homeless.append(file)
    if dealt and homeless:
        raise DataError(
            f"{len(homeless)} tables in {folder} belong to no split or to several, first "
            f'{homeless[0].name}; name the files of each split, for example train="train*.csv".'
        )
    ordered = {split: dealt[split] for split in SPLITS if split in dealt}
    return ordered or {"train": homeless}  # tables without any split word are all for training


def _other(
    builder: str, options: dict[str, object], wanted: dict[str, str | None], *, is_local: bool
) -> Located:
    """An image folder or a Hub data set: the splits are those that the builder reports."""
    found = Located(builder, options, {}, {}, is_local)
    with reading(f"the data set {builder!r}"):
        names = list(found.reader.as_streaming_dataset())
    chosen = found.names
    for split in SPLITS:
        value = wanted.get(split)
        if value and value not in names:
            raise DataError(f"{builder!r} has no split {value!r}; it has: {', '.join(names)}.")
        if value or split in names:
            chosen[split] = value or split
    return found
