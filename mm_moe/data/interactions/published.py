"""The files by which the published pipeline of interaction experts passes its results on.

| what | file below `{set}_data/` or the folder of experts | content |
| --- | --- | --- |
| captions | `data_gen_output/{set}_image_description_cogvlm2.json` | id -> caption |
| labels | `data_gen_output/{set}_{image_only_pred_cogvlm2,text_only_pred_qwen2}[_for_fuser].json` |
  id -> {"logits": {"Yes", "No"}, "gth", "pred"}, or the same as lines with "image_id" |
| split | `data_split_output/{set}_{R,U,AS}_dataset_{split}_cogvlm2_qwen2[_for_fuser].json` |
  id -> raw record |
| expert | `expert_{model}/{set}_{R,U,AS,baseline}_logits.jsonl` |
  {"image_id", "logits": [no, yes(, other)], "target"} |
| fuser | `expert_{model}/{set}_rus_logits.jsonl` | {"image_id", "logits": {"R", "U", "AS"}} |
| test | `{model_dir}/test_yesno_logits.json`, `test_rus_logits.json` | id -> list of numbers |

Source: the released artefacts of Yu et al., 2024. Ids are texts here, also where a file has whole
numbers. Axes: N samples, L logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mm_moe.data.interactions.strict_json import (
    Entry,
    read_lines,
    read_records,
    write_lines,
    write_records,
)
from mm_moe.errors import DataError

SETS = ("mmsd", "mustard", "urfunny")
SPLITS = {"train": "train", "validation": "val", "test": "test"}  # our names, theirs
CATEGORIES = ("R", "U", "AS")  # in the order of the fuser's logits
PARTS = (*CATEGORIES, "baseline")
LABELLERS = {"image": "image_only_pred_cogvlm2", "text": "text_only_pred_qwen2"}
ID = "image_id"
CLOSE = 1e-2  # logits of one sample that was run twice may differ by so much


def labels_name(dataset: str, modality: str, *, for_fuser: bool = False) -> str:
    """File name of a modality's labels ("image" or "text")."""
    return f"{dataset}_{LABELLERS[modality]}{'_for_fuser' if for_fuser else ''}.json"


def split_name(dataset: str, category: str, split: str, *, for_fuser: bool = False) -> str:
    """File name of the rows of one category in a split of our names."""
    end = "_for_fuser" if for_fuser else ""
    return f"{dataset}_{category}_dataset_{SPLITS[split]}_cogvlm2_qwen2{end}.json"


def expert_name(dataset: str, part: str) -> str:
    """File name of the test logits of one of `PARTS`, or of the fuser ("rus")."""
    return f"{dataset}_{part}_logits.jsonl"


@dataclass(frozen=True)
class UnimodalLabels:
    """What one modality's labeller said.

    Attributes:
        ids: N sample ids.
        score_N2: its scores of No and Yes, as stored: shares of the vocabulary's probability, or
            -10000 for an answer that was not among the likely ones.
        gold_N: labels.
        prediction_N: its own predictions, as stored.
    """

    ids: tuple[str, ...]
    score_N2: np.ndarray
    gold_N: np.ndarray
    prediction_N: np.ndarray


def read_labels(path: Path) -> UnimodalLabels:
    """A labeller's file: one object, or JSON lines where the name ends in .jsonl.

    Raises:
        DataError: it deviates from the schema, or names a sample twice.
    """
    lines = path.suffix == ".jsonl"
    entries = list(read_lines(path, id_key=ID) if lines else read_records(path))
    scores, gold, predictions = [], [], []
    seen: set[str] = set()
    for entry in entries:
        if entry.name in seen:
            entry.refuse(ID, "names a sample for the second time")
        seen.add(entry.name)
        both = _named(entry, "logits", ("No", "Yes"))
        scores.append(both)
        gold.append(entry.label("gth", entry.need("gth")))
        predictions.append(entry.label("pred", entry.need("pred")))
    return UnimodalLabels(
        tuple(entry.name for entry in entries),
        np.array(scores),
        np.array(gold),
        np.array(predictions),
    )


def write_labels(path: Path, labels: UnimodalLabels) -> None:
    """Write a labeller's file as one object."""
    rows = zip(labels.ids, labels.score_N2, labels.gold_N, labels.prediction_N, strict=True)
    records = {
        sample_id: {"logits": _yes_no(score_2), "gth": int(gold), "pred": int(prediction)}
        for sample_id, score_2, gold, prediction in rows
    }
    write_records(path, records)


def _yes_no(score_2: np.ndarray) -> dict[str, float]:
    return {"Yes": float(score_2[1]), "No": float(score_2[0])}


def read_split(path: Path) -> dict[str, dict[str, Any]]:
    """The raw records of one category and split by their ids; an empty object is no error.

    Raises:
        DataError: it deviates from the schema.
    """
    if path.is_file() and path.read_bytes().strip() == b"{}":
        return {}
    found = {}
    for entry in read_records(path):
        if not isinstance(entry.value, dict):
            entry.refuse(None, "must be an object, the sample's raw record")
        found[entry.name] = entry.value
    return found


def write_split(path: Path, records: dict[str, dict[str, Any]]) -> None:
    """Write the raw records of one category and split."""
    write_records(path, records)


def read_captions(path: Path) -> dict[str, str]:
    """Captions by id, from one object or from lines {"image", "caption"} (the file name's stem).

    Raises:
        DataError: it deviates from the schema.
    """
    found = {}
    if path.suffix == ".jsonl":
        for entry in read_lines(path, id_key="image"):
            found[Path(entry.name).stem] = _text(entry, "caption", entry.need("caption"))
        return found
    for entry in read_records(path):
        found[entry.name] = _text(entry, None, entry.value)
    return found


def _text(entry: Entry, key: str | None, value: Any) -> str:
    if not isinstance(value, str):
        entry.refuse(key, "must be a text")
    return value


@dataclass(frozen=True)
class ExpertLogits:
    """One model's logits over a split.

    Attributes:
        ids: N sample ids, in the file's order of first mention.
        logits_NL: (N, 2) for no and yes, (N, 3) with the reject class behind them; of a fuser
            (N, 3) for `CATEGORIES`.
        target_N: labels; None where the file has none.
        same_lines: lines that repeat a sample with the same numbers.
        close_lines: lines that repeat a sample with numbers that differ by no more than `CLOSE`.
    """

    ids: tuple[str, ...]
    logits_NL: np.ndarray
    target_N: np.ndarray | None
    same_lines: int = 0
    close_lines: int = 0


def read_expert_logits(path: Path) -> ExpertLogits:
    """An expert's lines; more keys than the schema's (ALBEF's "text" and "pred") are passed over.

    A sampler that pads runs some samples twice. Such lines are counted, and the later one counts,
    as in a table by id.

    Raises:
        DataError: it deviates from the schema, lines have 2 and 3 logits in turn, or two lines
            contradict each other about a sample.
    """
    rows = _LineTable()
    for entry in read_lines(path, id_key=ID):
        logits = entry.numbers("logits", entry.need("logits"), counts=(2, 3))
        target = entry.label("target", entry.need("target"), num_labels=len(logits))
        rows.add(entry, logits, target)
    return rows.table()


def read_fuser_logits(path: Path) -> ExpertLogits:
    """A fuser's lines, the logits in the order of `CATEGORIES`.

    Raises:
        DataError: as `read_expert_logits`.
    """
    rows = _LineTable()
    for entry in read_lines(path, id_key=ID):
        rows.add(entry, _named(entry, "logits", CATEGORIES), None)
    return rows.table()


def read_test_logits(path: Path) -> ExpertLogits:
    """`test_yesno_logits.json` or `test_rus_logits.json`: id -> 2 or 3 numbers, no targets.

    Raises:
        DataError: it deviates from the schema.
    """
    rows = _LineTable()
    for entry in read_records(path):
        rows.add(entry, entry.numbers("logits", entry.value, counts=(2, 3)), None)
    return rows.table()


def write_expert_logits(
    path: Path, ids: Sequence[str], *, logits_NL: np.ndarray, target_N: np.ndarray
) -> None:
    """Write an expert's lines."""
    rows = zip(ids, logits_NL.tolist(), target_N, strict=True)
    write_lines(path, [{ID: i, "logits": z, "target": int(y)} for i, z, y in rows])


def write_fuser_logits(path: Path, ids: Sequence[str], *, logits_NL: np.ndarray) -> None:
    """Write a fuser's lines from logits in the order of `CATEGORIES`."""
    rows = zip(ids, logits_NL.tolist(), strict=True)
    write_lines(path, [{ID: i, "logits": dict(zip(CATEGORIES, z, strict=True))} for i, z in rows])


def write_test_logits(path: Path, ids: Sequence[str], *, logits_NL: np.ndarray) -> None:
    """Write id -> list of logits."""
    write_records(path, dict(zip(ids, logits_NL.tolist(), strict=True)))


def _named(entry: Entry, key: str, names: tuple[str, ...]) -> list[float]:
    """The numbers of an object that has exactly these names, in their order."""
    value = entry.need(key)
    if not isinstance(value, dict) or set(value) != set(names):
        has = sorted(value) if isinstance(value, dict) else value
        entry.refuse(key, f"must be an object of {', '.join(names)}, has {has}")
    return [entry.number(f"{key}.{name}", value[name]) for name in names]


class _LineTable:
    """Lines by id, with what repeats and what contradicts."""

    def __init__(self) -> None:
        self.rows: dict[str, tuple[list[float], int | None, int | None]] = {}
        self.same = self.close = 0

    def add(self, entry: Entry, logits: list[float], target: int | None) -> None:
        if self.rows:
            width = len(next(iter(self.rows.values()))[0])
            if len(logits) != width:
                entry.refuse("logits", f"has {len(logits)} numbers, the lines before {width}")
        earlier = self.rows.get(entry.name)
        if earlier is not None:
            apart = max(abs(a - b) for a, b in zip(earlier[0], logits, strict=True))
            if earlier[1] != target or apart > CLOSE:
                entry.refuse(
                    "logits" if earlier[1] == target else "target",
                    f"contradicts line {earlier[2]}, which names the same sample: "
                    f"{earlier[0]}, {earlier[1]} there, {logits}, {target} here",
                )
            self.same += apart == 0
            self.close += apart > 0
        self.rows[entry.name] = (logits, target, entry.line)

    def table(self) -> ExpertLogits:
        rows = list(self.rows.values())
        targets = [row[1] for row in rows]
        return ExpertLogits(
            tuple(self.rows),
            np.array([row[0] for row in rows]),
            None if None in targets else np.array(targets),
            self.same,
            self.close,
        )


@dataclass(frozen=True)
class PublishedFolder:
    """Where the published files of one data set lie below a folder.

    Attributes:
        root: the folder; `{set}_data` and `expert_inference_output` may lie in it, or their content
            may lie in it directly.
        dataset: one of `SETS`.
    """

    root: Path
    dataset: str

    def find(self, folder: str, name: str) -> Path | None:
        """A file of `data_raw`, `data_gen_output` or `data_split_output`, if it is there."""
        places = (self.root / f"{self.dataset}_data", self.root)
        found = (place / folder / name for place in places)
        return next((path for path in (*found, self.root / name) if path.is_file()), None)

    def need(self, folder: str, name: str) -> Path:
        """The same.

        Raises:
            DataError: it is not there.
        """
        path = self.find(folder, name)
        if path is None:
            raise DataError(
                f"{str(self.root)!r} has no {self.dataset}_data/{folder}/{name}, nor {folder}/"
                f"{name} or {name}; name the folder that holds {self.dataset}_data."
            )
        return path

    def labels(self, modality: str, *, for_fuser: bool = False) -> UnimodalLabels:
        """A modality's labels.

        Raises:
            DataError: the file is not there or deviates.
        """
        name = labels_name(self.dataset, modality, for_fuser=for_fuser)
        lines = self.find("data_gen_output", f"{name}l")  # as they are written before they merge
        whole = self.find("data_gen_output", name)
        return read_labels(whole or lines or self.need("data_gen_output", name))

    def split_ids(self, split: str, *, for_fuser: bool = False) -> dict[str, str]:
        """Category of each id of a split.

        Raises:
            DataError: a file is not there or deviates, or a sample has two categories.
        """
        found: dict[str, str] = {}
        for category in CATEGORIES:
            name = split_name(self.dataset, category, split, for_fuser=for_fuser)
            path = self.need("data_split_output", name)
            for sample_id in read_split(path):
                if sample_id in found:
                    raise DataError(
                        f"{path}: id {sample_id!r} is in {found[sample_id]!r} too; a sample has "
                        "one category."
                    )
                found[sample_id] = category
        return found

    def expert_folders(self) -> Iterator[Path]:
        """Folders `expert_{model}` that hold any logits of this data set, by name."""
        nested = self.root / "expert_inference_output"
        base = nested if nested.is_dir() else self.root
        for folder in sorted(base.glob("expert_*")):
            if folder.is_dir() and any(folder.glob(f"{self.dataset}_*_logits.jsonl")):
                yield folder
