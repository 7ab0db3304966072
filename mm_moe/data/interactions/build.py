"""From what each modality says of each split to the table of categories and its report.

Axes: N rows of a split, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mm_moe.batch import IMAGE, Sample, base_modality
from mm_moe.data.interactions.categories import NONE
from mm_moe.data.interactions.hard_labels import (
    BALANCE,
    MIN_GAP,
    TRAIN,
    UniScores,
    calibrate,
    hard_labels,
)
from mm_moe.data.interactions.table import NAMED, InteractionTable, table_of
from mm_moe.errors import ConfigError, DataError
from mm_moe.registry import nearest

CALIBRATED, PAPER, FUSER, STORED = "calibrated", "paper", "paper_for_fuser", "stored"
MODES = (CALIBRATED, PAPER, FUSER, STORED)
SHIFT = 0.2  # change of a category's share of positive rows, from train, that is worth a warning


@dataclass(frozen=True)
class Judging:
    """How scores become predictions.

    Attributes:
        mode: "calibrated" (thresholds from train, the same everywhere), "paper" (filter and balance
            on train alone), "paper_for_fuser" (neither), or "stored" (the predictions of a file).
        min_gap: see `hard_labels`; None: the mode's own.
        balance: likewise.
    """

    mode: str = CALIBRATED
    min_gap: float | None = None
    balance: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ConfigError(f"--mode {self.mode!r} is unknown; {nearest(self.mode, list(MODES))}")
        for name, low, high in (("min_gap", 0.0, 1.0), ("balance", 0.0, 0.5)):
            value = getattr(self, name)
            if value is None:
                continue
            if not low <= value <= high:
                raise ConfigError(f"--{name} {value} must lie from {low:g} to {high:g}.")
            if self.mode in (FUSER, STORED):
                raise ConfigError(f"--{name} has no meaning with --mode {self.mode}; leave it out.")

    def predictions(
        self, scores: Mapping[str, UniScores]
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Split -> predictions (N,) of one modality, and how they were found.

        Raises:
            ConfigError: thresholds are to come from a training split that is not there.
        """
        if self.mode in (PAPER, FUSER):
            return self._published(scores)
        options = {"min_gap": self.min_gap or 0.0, "balance": self.balance or 0.0}
        if options["balance"] and TRAIN not in scores:
            raise ConfigError(
                "--balance finds its threshold on the split 'train', which is not among --splits."
            )
        rule = calibrate(scores.get(TRAIN, next(iter(scores.values()))), **options)
        found = {split: rule.labels(one) for split, one in scores.items()}
        return found, {"threshold": rule.threshold, **options}

    def _published(
        self, scores: Mapping[str, UniScores]
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        options: dict[str, Any] = {"min_gap": None, "balance": 0.0}
        if self.mode == PAPER:
            gap = MIN_GAP if self.min_gap is None else self.min_gap
            options = {"min_gap": gap, "balance": self.balance}
            options["balance"] = BALANCE if self.balance is None else self.balance
        modality = next(iter(scores.values())).modality
        options["gap"] = "ratio" if base_modality(modality) == IMAGE else "difference"
        found = {}
        for split, one in scores.items():
            found[split] = hard_labels(one, split=split, **options)
            # the release never lacks an answer; a labeller that said nothing at all does here
            found[split][np.isnan(one.score_NC).any(-1)] = NONE
        return found, options


def build_table(
    samples: Mapping[str, Sequence[Sample]],
    scores: Mapping[str, Mapping[str, UniScores]],
    *,
    dataset: str,
    label_names: Sequence[str],
    judging: Judging,
    stored: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    origin: Mapping[str, Any],
) -> InteractionTable:
    """The table of all splits.

    Args:
        samples: split -> its samples (ids and labels).
        scores: modality -> split -> scores of the same samples in the same order.
        dataset: its name.
        label_names: its classes.
        judging: how scores become predictions.
        stored: modality -> split -> predictions, for the mode "stored".
        origin: how the scores were made, for the record.

    Raises:
        ConfigError: settings that do not fit each other.
        DataError: scores of other samples.
    """
    rules: dict[str, Any] = {}
    predictions, probabilities = {}, {}
    for modality, by_split in scores.items():
        for split, rows in samples.items():
            _check_same(by_split[split], [sample.id for sample in rows], split)
        if judging.mode == STORED:
            if stored is None:
                raise ConfigError("--mode stored is for --labeller files.")
            found = dict(stored[modality])
        else:
            found, rules[modality] = judging.predictions(by_split)
        predictions[modality] = np.concatenate([found[split] for split in samples])
        parts = [by_split[split].probability_NC for split in samples]
        probabilities[modality] = np.concatenate(parts)
    everyone = [(split, sample) for split, rows in samples.items() for sample in rows]
    return table_of(
        dataset=dataset,
        label_names=label_names,
        ids=[sample.id for _, sample in everyone],
        splits=[split for split, _ in everyone],
        label_N=np.array([NONE if s.label is None else s.label for _, s in everyone]),
        predictions=predictions,
        probabilities=probabilities,
        origin={**origin, "mode": judging.mode, "rules": rules},
    )


def _check_same(scores: UniScores, ids: list[str], split: str) -> None:
    if list(scores.ids) != ids:
        other = [i for i in ids if i not in set(scores.ids)][:NAMED] or ids[:NAMED]
        raise DataError(
            f"the scores of {scores.modality!r} are not of the samples of split {split!r} in their "
            f"order, first {', '.join(map(repr, other))}."
        )


def describe(table: InteractionTable) -> dict[str, Any]:
    """Counts, shares of positive rows and accuracies per split, and what to beware of.

    With more than two classes "positive" is the share of a category's largest class.
    """
    splits = {split: _describe_split(table, split) for split in dict.fromkeys(table.splits)}
    return {
        "dataset": table.dataset,
        "modalities": list(table.modalities),
        "classes": len(table.label_names),
        "origin": dict(table.origin),
        "splits": splits,
        "warnings": _warnings(splits, binary=len(table.label_names) == 2),
    }


def _describe_split(table: InteractionTable, split: str) -> dict[str, Any]:
    row_N = table.rows_of(split)
    code_N, label_N = table.code_N[row_N], table.label_N[row_N]
    categories = {}
    for code, name in enumerate(table.names):
        own = label_N[code_N == code]
        if name == "DS" and len(table.label_names) == 2 and len(table.modalities) == 2:
            continue  # cannot occur
        counts = np.bincount(own, minlength=len(table.label_names)) if len(own) else np.zeros(1)
        share = counts[1] if len(table.label_names) == 2 and len(own) else counts.max()
        categories[name] = {
            "rows": len(own),
            "share": len(own) / max(1, int((code_N != NONE).sum())),
            "positive": float(share / len(own)) if len(own) else None,
        }
    accuracy = {}
    for name in table.modalities:
        said_N = table.predictions[name][row_N]
        known_N = (said_N != NONE) & (label_N != NONE)
        accuracy[name] = float((said_N == label_N)[known_N].mean()) if known_N.any() else None
    counts = np.bincount(label_N[label_N != NONE], minlength=1)
    return {
        "rows": len(row_N),
        "without_category": int((code_N == NONE).sum()),
        "majority_label": float(counts.max() / max(1, counts.sum())),
        "accuracy": accuracy,
        "categories": categories,
    }


def _warnings(splits: dict[str, dict[str, Any]], *, binary: bool) -> list[str]:
    """That categories leak the label, and where they mean something else than in training."""
    found = [
        "a category contains the label: with the predictions it gives the answer for R"
        + (" and AS" if binary else "")
        + ". Use it to train on, never as an input of rows that are scored."
    ]
    if not binary or TRAIN not in splits:
        return found
    for split, about in splits.items():
        for name, category in about["categories"].items():
            before = splits[TRAIN]["categories"][name]["positive"]
            after = category["positive"]
            if None not in (before, after) and abs(after - before) > SHIFT:
                found.append(
                    f"{name} is {before:.0%} positive in train and {after:.0%} in {split}: experts "
                    "that learn their category's share of labels will be off."
                )
    return found
