"""Raw rows to a folder of Parquet shards, written aside and renamed when it is whole.

The folder holds `SPLIT-NNNNN.parquet` shards (id, group, one column per modality, label),
`dataset_info.json` and `quarantine.jsonl`. Images stay encoded, texts are texts, a sequence is the
bytes of its float32 array, whose width is in `dataset_info.json`; an array is its bytes, with shape
and type there.

In private data the shards hold pseudonyms. `ids.csv` translates them; it, and a split file that an
adapter deals, are the only files with the download's own identifiers. Only their owner may read
them, and nothing here does: leave them out when you hand the folder on.
"""

from __future__ import annotations

import collections
import hashlib
import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from mm_moe.data.prepare.check import CheckedRow, Rules, check_row
from mm_moe.data.prepare.masked import write_mask
from mm_moe.data.prepare.pseudonyms import Pseudonyms, write_owned
from mm_moe.data.prepare.raw import (
    ARRAYS,
    EVENT_LISTS,
    IMAGES,
    SEQUENCES,
    RawDataSet,
    RawRow,
)
from mm_moe.data.prepare.shards import SplitWriter
from mm_moe.data.prepare.statistics import ArrayShape, EventShape, SequenceStatistics
from mm_moe.data.reading import file_sha256
from mm_moe.data.sets.prepared import FORMAT, INFO
from mm_moe.errors import ConfigError, DataError

QUARANTINE = "quarantine.jsonl"
NAMED = 3  # bad rows that a message names
CHUNK = 16  # rows that a worker takes at once


def prepare(
    raw: RawDataSet,
    *,
    output: Path,
    workers: int = 1,
    max_bad_ratio: float = 0.01,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a data set and return the content of its `dataset_info.json`.

    Args:
        raw: the download.
        output: the folder to make.
        workers: processes that read and check images; sequences are checked in this one.
        max_bad_ratio: share of a split's rows that may be bad.
        overwrite: replace an earlier output.

    Raises:
        ConfigError: the output exists or cannot be made, or a number is out of range.
        DataError: too many bad rows, or a split without a good one; nothing is left behind.
    """
    check_target(output, overwrite=overwrite)
    if workers < 1:
        raise ConfigError(f"--workers {workers} must be at least 1.")
    if not 0 <= max_bad_ratio <= 1:
        raise ConfigError(f"--max_bad_ratio {max_bad_ratio} is a share of the rows, from 0 to 1.")
    output = output.resolve()  # "." has no name, and a link is no folder
    aside = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(
            f"--output {str(output)!r} cannot be made ({error.strerror}); name another folder."
        ) from error
    try:
        info = _Preparation(raw, aside, workers=workers, max_bad_ratio=max_bad_ratio).run()
        _publish(aside, output)
    except OSError as error:
        raise DataError(
            f"{raw.name!r} cannot be written to {str(output)!r}: {error.strerror}; nothing is left "
            "behind. Is there space, and can all files of --source be read?"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return info


def check_target(output: Path, *, overwrite: bool) -> None:
    """Refuse an output that exists, unless it may be replaced and is an earlier output.

    Raises:
        ConfigError: see above.
    """
    if output.resolve() == Path(output.resolve().anchor):
        raise ConfigError(
            f"--output {str(output)!r} is the root of the file system; name a folder."
        )
    try:
        if not output.exists() or (output.is_dir() and not any(output.iterdir())):
            return
    except OSError as error:
        raise ConfigError(
            f"--output {str(output)!r} cannot be read ({error.strerror}); name another folder."
        ) from error
    if not (output / INFO).is_file():
        raise ConfigError(
            f"--output {str(output)!r} holds something that is no prepared data set; name a new "
            "folder."
        )
    if not overwrite:
        raise ConfigError(
            f"--output {str(output)!r} holds a prepared data set already; name a new folder or "
            "replace it with --overwrite."
        )


def _publish(aside: Path, output: Path) -> None:
    """Rename; the earlier folder goes only when the new one is whole."""
    old = output.with_name(f".{output.name}.{os.getpid()}.old")
    if output.exists():
        output.rename(old)
    aside.rename(output)
    shutil.rmtree(old, ignore_errors=True)


class _Preparation:
    """One pass over a raw data set into `folder`."""

    def __init__(
        self, raw: RawDataSet, folder: Path, *, workers: int, max_bad_ratio: float
    ) -> None:
        self.raw, self.folder = raw, folder
        self.workers, self.max_bad_ratio = workers, max_bad_ratio
        self.split_of: dict[str, str] = {}  # id -> the split that has it
        self.split_of_group: dict[str, str] = {}
        self.pseudonyms = Pseudonyms.of(raw) if raw.private else None
        self.statistics: dict[str, SequenceStatistics | ArrayShape | EventShape] = {}
        for name, kind in raw.kinds.items():
            if kind == SEQUENCES:
                self.statistics[name] = SequenceStatistics(name)
            elif kind == ARRAYS:
                self.statistics[name] = ArrayShape(name, scale=raw.scales.get(name, 1.0))
            elif kind == EVENT_LISTS:
                self.statistics[name] = EventShape(raw.variables[name], hours=raw.hours)

    def run(self) -> dict[str, Any]:
        """Write every split, then the record."""
        with (self.folder / QUARANTINE).open("w", encoding="utf-8") as quarantine:
            splits = {split: self._split(split, quarantine) for split in self.raw.splits()}
        raw = self.raw
        if self.pseudonyms:
            self.pseudonyms.write(self.folder)
        for name, content in raw.extras().items():
            write_owned(self.folder / name, content)
        info = {
            "format": FORMAT,
            "name": raw.name,
            "modalities": {
                name: {"kind": kind, **self._shape(name)} for name, kind in raw.kinds.items()
            },
            "problem_type": raw.problem_type,
            "task": raw.task,
            "label_names": list(raw.label_names),
            "license": raw.license,
            "notes": list(raw.notes),
            "options": raw.options,
            "private": raw.private,
            "findings": raw.findings(),
            "unlabelled": raw.unlabelled,
            "splits": splits,
            "sources": {
                path.relative_to(raw.source).as_posix(): file_sha256(path) for path in raw.indices()
            },
        }
        (self.folder / INFO).write_text(json.dumps(info, indent=1), encoding="utf-8")
        return info

    def _shape(self, modality: str) -> dict[str, Any]:
        if modality not in self.statistics:
            return {}
        record = self.statistics[modality].record()
        if modality in self.raw.forms:
            record["form"] = self.raw.forms[modality]
        if modality in self.raw.volumes:
            volume = self.raw.volumes[modality]
            record |= write_mask(self.folder, modality, volume.mask, volume.axes)
        return record

    def _split(self, split: str, quarantine: Any) -> dict[str, Any]:
        """Write one split and return its record."""
        reasons: collections.Counter[str] = collections.Counter()
        missing = dict.fromkeys(self.raw.kinds, 0)
        repairs: collections.Counter[str] = collections.Counter()
        bad: list[str] = []
        digest = hashlib.sha256()
        with SplitWriter(self.folder, split, raw=self.raw) as writer:
            for row in self._checked(split):
                fault = row.fault or self._claim(row, split)
                if fault:
                    reason = _kind(fault) if self.raw.private else fault
                    line = {"split": split, "id": row.id, "reason": reason}
                    quarantine.write(json.dumps(line) + "\n")
                    reasons[_kind(fault)] += 1
                    bad.append(row.id)
                    continue
                for name in set(missing) - set(row.payload):
                    missing[name] += 1
                repairs.update(row.repairs)
                digest.update(f"{row.id} {row.sha256}\n".encode())
                writer.add(row)
        self._judge(split, good=writer.num_rows, bad=bad, reasons=reasons)
        return {
            "rows": writer.num_rows,
            "files": writer.files,
            "quarantined": len(bad),
            "reasons": dict(reasons),
            "missing": missing,
            "repairs": dict(repairs),
            "content_sha256": digest.hexdigest(),
        }

    def _claim(self, row: CheckedRow, split: str) -> str | None:
        """Take note of a good row; a fault if its id or its sequences' widths do not fit."""
        if row.id in self.split_of:
            return f"duplicate id, first in {self.split_of[row.id]}"
        if self.raw.groups_apart:
            self._keep_apart(row, split)
        for name, statistics in self.statistics.items():
            fault = statistics.see(row.payload.get(name), count=split in self.raw.statistics_over)
            if fault:
                return fault
        self.split_of[row.id] = split
        return None

    def _keep_apart(self, row: CheckedRow, split: str) -> None:
        """Refuse a group whose rows lie in two splits."""
        group = row.id if row.group is None else row.group
        other = self.split_of_group.setdefault(group, split)
        if other != split:
            raise DataError(
                f"{group!r} of {self.raw.name!r} has rows in {other} and in {split}: a patient "
                "must be in one split only, or the scores tell of patients that the model knows. "
                "Mend the file of the splits."
            )

    def _rows(self, split: str) -> Iterator[RawRow]:
        """The rows of a split, under pseudonyms where the data are private."""
        rows = self.raw.rows(split)
        if self.pseudonyms is None:
            return rows
        return (self.pseudonyms.hide(row, split) for row in rows)

    def _checked(self, split: str) -> Iterator[CheckedRow]:
        """The checked rows of a split in their order."""
        rules = Rules(
            dict(self.raw.kinds),
            self.raw.problem_type,
            len(self.raw.label_names),
            needs_label=self.raw.needs_labels and split not in self.raw.unlabelled,
            trims_padding=self.raw.trims_padding,
            variables={name: len(known) for name, known in self.raw.variables.items()},
            gaps=frozenset(name for name, form in self.raw.forms.items() if form == "table"),
        )
        check = partial(check_row, rules=rules)
        if self.workers == 1 or IMAGES not in self.raw.kinds.values():
            yield from map(check, self._rows(split))
            return
        # Spawned, not forked: libraries in this process may hold threads.
        with multiprocessing.get_context("spawn").Pool(self.workers) as pool:
            yield from pool.imap(check, self._rows(split), chunksize=CHUNK)

    def _judge(
        self, split: str, *, good: int, bad: list[str], reasons: collections.Counter[str]
    ) -> None:
        """Refuse a split with too few good rows."""
        total = good + len(bad)
        if total == 0:
            raise DataError(
                f"split {split!r} of {self.raw.name!r} names no row; the download has too few, or "
                "its file of splits leaves this one empty."
            )
        if len(bad) <= self.max_bad_ratio * total and good:
            return
        most = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(NAMED))
        raise DataError(
            f"{len(bad)} of {total} rows of split {split!r} are bad, over --max_bad_ratio "
            f"{self.max_bad_ratio:g} ({most}); the first are {', '.join(bad[:NAMED])}. "
            "Mend the download or raise the limit."
        )


def _kind(fault: str) -> str:
    """The part of a reason that many rows share, for counting."""
    return fault.split(" (")[0].split(":")[0]
