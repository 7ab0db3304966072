"""Findings of fastMRI+ (Zhao et al., 2022) as four labels of a slice, and the split by volumes.

Files: `knee.csv` (file, slice, study_level, x, y, width, height, label; a box a line) and
`knee_file_list.csv` (a volume a line, no header): a volume that is listed was read, so a slice of
it without a box has no finding.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from mm_moe.errors import DataError

FINDINGS = ("abnormal", "mtear", "acl", "cartilage")
COLUMNS = ("file", "slice", "label")
SPLIT_NAMES = {"train": "train_class", "validation": "val_class", "test": "test_class"}
SEED = 0  # of the published split
LEAST = 4  # volumes that leave no split empty


def four_labels(findings: Iterable[str]) -> list[int]:
    """Zeros and ones in the order of `FINDINGS`; what fits none of the last three is abnormal."""
    found = {_label(finding) for finding in findings if finding and finding.strip()}
    return [int(name in found) for name in FINDINGS]


def _label(finding: str) -> str:
    small = finding.lower()
    if "acl" in small.split():
        return "acl"
    if "meniscus tear" in small:
        return "mtear"
    return "cartilage" if "cartilage" in small else "abnormal"


def read_findings(path: Path) -> dict[tuple[str, int], list[str]]:
    """(volume, slice) -> its findings, each once, in the file's order.

    Findings of a whole study stand at the slice that their line names (0), as in published code; a
    line that names no slice or no finding is passed over.

    Raises:
        DataError: no such file, or it lacks a column.
    """
    found: dict[tuple[str, int], list[str]] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            lost = [name for name in COLUMNS if name not in (table.fieldnames or ())]
            if lost:
                raise DataError(f"{path} has no column {lost[0]!r}; take knee.csv of fastMRI+.")
            for line in table:
                if line["label"] and (line["slice"] or "").strip().isdecimal():
                    findings = found.setdefault((line["file"], int(line["slice"])), [])
                    if line["label"] not in findings:
                        findings.append(line["label"])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read: {type(error).__name__}.") from error
    return found


def read_volumes(path: Path) -> list[str]:
    """The volumes that were read by the annotators, sorted.

    Raises:
        DataError: no such file, or an empty one.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {type(error).__name__}.") from error
    names = {line.split(",")[0].strip().removesuffix(".h5") for line in lines}
    if not names - {""}:
        raise DataError(f"{path} names no volume; take knee_file_list.csv of fastMRI+.")
    return sorted(names - {""})


def split_volumes(volumes: Sequence[str]) -> dict[str, str]:
    """Volume -> split: 70, 15 and 15 per cent, all slices of a volume together.

    The published code deals a set of names, whose order (and so the split) changes from process to
    process; here the names are sorted first. A patient may have several volumes: neither keeps
    them together.

    Raises:
        DataError: fewer than four volumes, which leave a split empty.
    """
    from sklearn.model_selection import train_test_split  # slow to import

    if len(volumes) < LEAST:
        raise DataError(
            f"{len(volumes)} volumes cannot be dealt into three splits; it takes {LEAST}."
        )
    train, rest = train_test_split(sorted(volumes), test_size=0.3, random_state=SEED)
    test, validation = train_test_split(rest, test_size=0.5, random_state=SEED)
    parts = {"train": train, "validation": validation, "test": test}
    return {volume: split for split, names in parts.items() for volume in names}
