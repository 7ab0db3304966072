"""Which files hold the cells of which species: the `files` option, read and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm_moe.errors import ConfigError, DataError
from mm_moe.registry import nearest

COUNTS_MARK = "_counts_"  # {species}_counts_{k}.npz or .parquet
ENDINGS = (".h5ad", ".npz", ".parquet")
SPLITS = ("train", "validation", "test")
SETTINGS = ("path", "genes", "only")


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A file of one species.

    Attributes:
        species: whose cells.
        path: the file.
        split: where all its cells belong; None: that is decided cell by cell.
        prefix: only genes whose name begins so are read, and lose it.
        only: column -> labels; only cells that have one of them are read.
    """

    species: str
    path: Path
    split: str | None = None
    prefix: str = ""
    only: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def listed_files(files: Mapping[str, Any] | None, folder: Path) -> list[Listed]:
    """The files of each species, those of one species in a fixed order.

    Args:
        files: species -> what holds its cells: a path or pattern within the folder, a list of them,
            {"path": ..., "genes": "hg19_", "only": {"species": "hg19"}}, or any of these by split,
            {"train": ..., "validation": ..., "test": ...}. None: every file of the folder, by the
            first word of its name (`human_bone_marrow.h5ad`, `human_counts_3.npz`).
        folder: where the paths begin.

    Raises:
        ConfigError: an entry that is none of these.
        DataError: no such file.
    """
    if files is None:
        files = _by_first_word(folder)
    if not isinstance(files, Mapping) or not files:
        raise ConfigError(
            'the option "files" must be an object: {"human": "human.h5ad", "mouse": "mouse.h5ad"}.'
        )
    found: list[Listed] = []
    for species, entry in files.items():
        if isinstance(entry, Mapping) and entry and set(entry) <= set(SPLITS):
            for split, own in entry.items():
                found += _entry(species, own, folder, split)
        else:
            found += _entry(species, entry, folder, None)
    _refuse_twice(found)
    return found


def _refuse_twice(found: Sequence[Listed]) -> None:
    """Refuse cells that would be read twice, perhaps in two splits."""
    seen: set[tuple[Any, ...]] = set()
    for one in found:
        key = (one.path.resolve(), one.prefix, tuple(sorted(one.only.items())))
        if key in seen:
            raise ConfigError(
                f"the files option names {one.path.name} twice, the second time for "
                f'{one.species!r}; name a file once, or say with "only" which of its cells.'
            )
        seen.add(key)


def _by_first_word(folder: Path) -> dict[str, list[str]]:
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}; check data_dir.")
    names = sorted(p.name for p in folder.iterdir() if p.suffix in ENDINGS)
    names = [n for n in names if COUNTS_MARK in n or not n.endswith((".npz", ".parquet"))]
    if not names:
        raise DataError(f"there is no file of cells in {folder} ({', '.join(ENDINGS)}).")
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.partition("_")[0].partition(".")[0], []).append(name)
    return found


def _entry(species: str, entry: Any, folder: Path, split: str | None) -> list[Listed]:
    own: Mapping[str, Any] = entry if isinstance(entry, Mapping) else {"path": entry}
    for key in own:
        if key not in SETTINGS:
            raise ConfigError(
                f"the files of {species!r} have no setting {key!r}; {nearest(key, list(SETTINGS))}"
            )
    patterns = own.get("path")
    patterns = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(patterns, Sequence) or not all(isinstance(p, str) for p in patterns):
        raise ConfigError(f'the files of {species!r} need a "path": a name, pattern, or list.')
    if not isinstance(own.get("genes", ""), str):
        raise ConfigError(f'"genes" of {species!r} must be the beginning of names, as "hg19_".')
    return [
        Listed(
            species=species,
            path=path,
            split=split,
            prefix=own.get("genes", ""),
            only=_only(species, own.get("only", {})),
        )
        for pattern in patterns
        for path in _matches(folder, pattern)
    ]


def _only(species: str, given: Any) -> dict[str, tuple[str, ...]]:
    lists = given.values() if isinstance(given, Mapping) else [None]
    if not all(isinstance(labels, str | list | tuple) for labels in lists):
        raise ConfigError(
            f'"only" of {species!r} must be an object of labels: {{"species": "hg19"}}.'
        )
    return {
        column: (labels,) if isinstance(labels, str) else tuple(map(str, labels))
        for column, labels in given.items()
    }


def _matches(folder: Path, pattern: str) -> list[Path]:
    if Path(pattern).is_absolute() or not any(mark in pattern for mark in "*?["):
        path = folder / pattern
        if not path.is_file():
            raise DataError(f"there is no {path}; check data_dir and the files option.")
        return [path]
    found = sorted(folder.glob(pattern), key=lambda path: (len(path.name), path.name))
    if not found:
        raise DataError(f"no file in {folder} matches {pattern!r}; check the files option.")
    return found
