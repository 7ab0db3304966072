"""Hateful Memes (Kiela et al., 2020): memes with their text, hateful or not.

Layout: `{train,dev,test}.jsonl` (rows {"id", "img", "label", "text"}) and `img/*.png`, in the
folder itself or in `data/` below it. `img` is relative to the folder of the tables.

The challenge's own `test.jsonl` has no labels. The field scores `test_seen.jsonl` (1,000 rows) or
`test_unseen.jsonl` (2,000 rows), and papers do not always say which: name it in the results.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mm_moe.batch import IMAGE, TEXT
from mm_moe.data.prepare.raw import IMAGES, TEXTS, RawDataSet, RawRow
from mm_moe.data.schema import BINARY, SINGLE_LABEL
from mm_moe.errors import DataError


class HatefulMemesRaw(RawDataSet):
    """The published folder.

    Args:
        source: the folder, or the one that has it as `data/`.
        dev_file: table of the validation split.
        test_file: table of the test split. A table in which no row has a label becomes a split that
            cannot be scored.
    """

    name = "hateful_memes"
    problem_type = SINGLE_LABEL
    task = BINARY
    label_names = ("not_hateful", "hateful")
    license = (
        "Hateful Memes (Facebook AI, 2020): research licence of the challenge, not to be shared"
    )
    notes = (
        "The score is the AUROC of the hateful class.",
        "Which test table was read is in options.test_file; published numbers differ in it.",
    )

    def __init__(
        self, source: Path, *, dev_file: str = "dev.jsonl", test_file: str = "test.jsonl"
    ) -> None:
        super().__init__(source)
        self.kinds = {IMAGE: IMAGES, TEXT: TEXTS}
        nested = () if (source / "train.jsonl").is_file() else ("data",)
        if nested and not (source / "data").is_dir():
            nested = ()
        self.tables = {"train": "train.jsonl", "validation": dev_file, "test": test_file}
        self.paths = {split: self.need(*nested, name) for split, name in self.tables.items()}
        self.folder = self.need(*nested, "img").parent
        self.records = {split: _read(path) for split, path in self.paths.items()}
        records = self.records["test"]
        if records and all(record.get("label") is None for _, record in records):
            self.unlabelled["test"] = (
                f"no row of {test_file} has a label, as in the challenge's own file; prepare with "
                '--options \'{"test_file": "test_seen.jsonl"}\' or score the validation split'
            )

    def splits(self) -> tuple[str, ...]:
        """Train, validation ("dev") and test."""
        return tuple(self.tables)

    def indices(self) -> list[Path]:
        """The three tables."""
        return list(self.paths.values())

    @property
    def options(self) -> dict[str, Any]:
        """Which tables were read."""
        return {"dev_file": self.tables["validation"], "test_file": self.tables["test"]}

    def rows(self, split: str) -> Iterator[RawRow]:
        """One row for each line."""
        for number, record in self.records[split]:
            if record.get("id") is None or not isinstance(record.get("img"), str):
                yield RawRow(f"{self.tables[split]}:{number}", fault="no id, or no img")
                continue
            image = (self.folder / record["img"]).resolve()
            if not image.is_relative_to(self.folder.resolve()):
                yield RawRow(str(record["id"]), fault="img leads out of the folder")
                continue
            payload = {IMAGE: image, TEXT: record.get("text") or ""}
            yield RawRow(str(record["id"]), payload, record.get("label"))


def _read(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """(line number, record) of each line of a JSON-lines file that is not empty."""
    found = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip():
                record = json.loads(line)
                found.append((number, record if isinstance(record, dict) else {}))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON lines: line {number} does not parse.") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {type(error).__name__}.") from error
    return found
