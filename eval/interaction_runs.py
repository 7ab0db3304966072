"""From the predictions of trained baselines, experts and fusers to a table of fusion rules.

K experts, N samples, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.grid_plan import Cell
from eval.grid_table import Spread
from eval.interaction_fusion import (
    DEFAULT_TAU,
    Experts,
    joined,
    label_frequencies,
    softmax,
    without_reject,
)
from eval.interaction_scores import headline_of, scores
from eval.interaction_table import Answer, answers, score_table
from eval.interactions_plan import BASELINE, Plan
from eval.metrics import has_label
from eval.predictions import PredictionFile, hash_ids
from mm_moe.data.interactions.categories import COARSE
from mm_moe.data.interactions.table import InteractionTable

ENSEMBLE = "ensemble"
FLOOR = 1e-30


@dataclass(frozen=True)
class Fused:
    """Finished trainings and what they were scored on.

    Attributes:
        folder: of the trainings.
        plan: what was trained.
        table: the categories.
        data: "name", "label_names", "train_split" and "test_split" of the data.
        splits: that were scored, the test split last.
        test: the test pattern.
        tau: of the cascade.
    """

    folder: Path
    plan: Plan
    table: InteractionTable
    data: dict[str, Any]
    splits: Sequence[str]
    test: str
    tau: float = DEFAULT_TAU

    def predictions(self, cell: Cell, split: str) -> PredictionFile:
        """The predictions of one model."""
        run = self.folder / "cells" / cell.folder_name / "run"
        return PredictionFile.load(run / f"predictions-{split}.npz")

    def experts(self, seed: int, split: str) -> Experts:
        """What the models of a seed say about the labelled samples of a split, joined by id.

        Raises:
            DataError: models were scored on different samples.
        """
        plan = self.plan
        cells = {name: plan.expert(name, seed, start=None) for name in plan.categories}
        cells |= {f"member {m}": cell for m, cell in enumerate(plan.members(seed))}
        files = {name: self.predictions(cell, split) for name, cell in cells.items()}
        files["fuser"] = self.predictions(plan.fuser(seed), split)
        first = files["member 0"]
        parts = {
            name: dict(zip(file.ids.tolist(), file.logits[self.test], strict=True))
            for name, file in files.items()
        }
        labels = first.labels[self.test]
        keep = has_label(labels)
        found = {n: v[keep] for n, v in joined(parts, order=first.ids.tolist()).items()}
        classes = len(self.data["label_names"])
        each = [without_reject(found[name], num_classes=classes) for name in plan.categories]
        members = [softmax(v) for name, v in found.items() if name.startswith("member ")]
        ensemble = np.log(np.maximum(np.mean(members, axis=0), FLOOR))
        ids = first.ids[keep].tolist()
        return Experts(
            ids=tuple(ids),
            names=plan.categories,
            logits=np.stack([logits for logits, _ in each]),
            labels=labels[keep].astype(int),
            reject=np.stack([reject for _, reject in each]),
            gate=found["fuser"],
            category=self.category(ids, split),
            baselines={BASELINE: found["member 0"], ENSEMBLE: ensemble},
            groups=first.groups[keep],
        )

    def category(self, ids: Sequence[str], split: str) -> np.ndarray:
        """Place of each sample's category among the experts; -1 without one."""
        rows = self.table.rows_of(split)
        hashed = hash_ids([self.table.ids[row] for row in rows], dataset=self.data["name"])
        place = self._places()
        of_id = {
            one: place.get(code, -1)
            for one, code in zip(hashed.tolist(), self.table.coarse_N[rows].tolist(), strict=True)
        }
        return np.array([of_id.get(one, -1) for one in ids])

    def prior(self) -> np.ndarray:
        """Label frequencies of each category's training rows (K, C)."""
        rows, place = self.table.rows_of(self.data["train_split"]), self._places()
        category = np.array([place.get(code, -1) for code in self.table.coarse_N[rows].tolist()])
        return label_frequencies(
            self.table.label_N[rows],
            category,
            num_experts=len(self.plan.categories),
            num_classes=len(self.data["label_names"]),
        )

    def _places(self) -> dict[int, int]:
        """Coarse code -> place among the experts."""
        return {COARSE.index(name): n for n, name in enumerate(self.plan.categories)}


def fuse_runs(fused: Fused, seeds: Sequence[int], *, num_resamples: int) -> dict[str, Any]:
    """The section of a report about the test split (see `eval.interaction_report`).

    Args:
        fused: the trainings.
        seeds: those of which all models are there.
        num_resamples: of the paired bootstrap.
    """
    *validations, test_split = fused.splits
    test = {seed: fused.experts(seed, test_split) for seed in seeds}
    answered: dict[int, list[Answer]] = {}
    notes: list[str] = []
    for seed in seeds:
        validation = fused.experts(seed, validations[0]) if validations else None
        answered[seed], notes = answers(
            test[seed], validation=validation, prior_KC=fused.prior(), tau=fused.tau
        )
    rows = score_table(answered, test, references=[BASELINE, ENSEMBLE], num_resamples=num_resamples)
    fuser = fuser_scores(list(test.values()), fused)
    said = ", ".join(
        f"{name.replace('_', ' ')} {100 * value['mean']:.1f}" for name, value in fuser.items()
    )
    first, name = test[seeds[0]], fused.data["name"]
    return {
        "title": f"{name}, {test_split} ({len(first.ids)} samples, {len(seeds)} seeds)",
        "metric": headline_of(first.num_classes),
        "notes": [f"the fuser on the test categories: {said}", *notes],
        "fuser": fuser,
        "rows": rows,
    }


def fuser_scores(tests: Sequence[Experts], fused: Fused) -> dict[str, dict[str, Any]]:
    """How well the fuser finds the categories, and what the commonest training category scores."""
    rows = fused.table.rows_of(fused.data["train_split"])
    codes = fused.table.coarse_N[rows].tolist()
    counts = [codes.count(COARSE.index(name)) for name in fused.plan.categories]
    found: dict[str, dict[int, float]] = {}
    for seed, one in enumerate(tests):
        assert one.gate is not None
        assert one.category is not None
        has = one.category >= 0
        values = scores(softmax(one.gate[has]), one.category[has])
        values["majority_accuracy"] = float((one.category[has] == int(np.argmax(counts))).mean())
        for name in ("accuracy", "majority_accuracy", "macro_f1", "ece"):
            found.setdefault(name, {})[seed] = values[name]
    spreads = {name: Spread.of(values) for name, values in found.items()}
    return {name: {"mean": one.mean, "std": one.std} for name, one in spreads.items()}
