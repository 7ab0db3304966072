"""The numbers of a grid: mean and spread over seeds, and paired comparisons over samples.

N labelled test rows, R resamples, C labels.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from eval.chance import best_chance
from eval.grid_cells import DONE
from eval.grid_plan import Cell
from eval.metrics import resampled
from eval.patterns import COMPLETE
from eval.predictions import PredictionFile
from eval.resamples import draw_groups, interval_of
from mm_moe.errors import DataError

Records = Mapping[Cell, Mapping[str, Any]]
MEAN_MISSING = "mean of the missing"  # over all test patterns that lack something
ALL_TRAINS = "all patterns"  # the mean over the training patterns


@dataclass(frozen=True)
class Spread:
    """Values over seeds; the standard deviation is that of a sample (n - 1), None for one seed."""

    mean: float
    std: float | None
    seeds: tuple[int, ...]

    @classmethod
    def of(cls, by_seed: Mapping[int, float]) -> Spread:
        """Mean and spread of one value per seed."""
        values = list(by_seed.values())
        std = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), std, tuple(sorted(by_seed)))


def finished(records: Records) -> dict[Cell, Mapping[str, Any]]:
    """The cells that have scores."""
    return {cell: record for cell, record in records.items() if record["status"] == DONE}


def table(
    records: Records, *, split: str, tests: Sequence[str], metrics: Sequence[str]
) -> list[dict[str, Any]]:
    """One row per method, training pattern, test pattern and metric of a split.

    Returns:
        Rows {"method", "train", "test", "split", "metric", "mean", "std", "seeds", "chance",
        "num_rows"}; chance is the better of two blind models. With several test patterns that lack
        something, a row `MEAN_MISSING` gives their mean, formed within each seed; with several
        training patterns a row `ALL_TRAINS` averages these over the seeds that all of them have.
    """
    groups: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = {}
    for cell, record in finished(records).items():
        of_split = record["splits"][split]
        groups.setdefault((cell.method.name, cell.train), {})[cell.seed] = of_split
    rows = []
    for (method, train), by_seed in groups.items():
        for metric in metrics:
            for test, conditions in _columns(tests).items():
                values = {
                    seed: statistics.fmean(_scores(document)[test][metric] for test in conditions)
                    for seed, document in by_seed.items()
                }
                first = next(iter(by_seed.values()))
                levels = [best_chance(first["chance"][one], metric=metric) for one in conditions]
                known = [level for level in levels if level is not None]
                spread = Spread.of(values)
                rows.append(
                    {"method": method, "train": train, "test": test, "split": split}
                    | {"metric": metric, "mean": spread.mean, "std": spread.std}
                    | {"seeds": list(spread.seeds), "values": [values[s] for s in spread.seeds]}
                    | {"chance": statistics.fmean(known) if len(known) == len(levels) else None}
                    | {"num_rows": first["num_rows"][conditions[0]]}
                )
    return rows + _over_trains(rows)


def _over_trains(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows `MEAN_MISSING` averaged over training patterns, for each method and metric."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    trains = {row["train"] for row in rows}
    for row in rows:
        if row["test"] == MEAN_MISSING:
            groups.setdefault((row["method"], row["metric"]), []).append(row)
    merged = []
    for of_train in groups.values():
        values = [dict(zip(row["seeds"], row["values"], strict=True)) for row in of_train]
        seeds = sorted(set.intersection(*map(set, values)))
        if len(of_train) < max(len(trains), 2) or not seeds:
            continue  # a mean over other patterns than those of the other methods
        by_seed = {seed: statistics.fmean(of[seed] for of in values) for seed in seeds}
        spread = Spread.of(by_seed)
        merged.append(
            of_train[0]
            | {"train": ALL_TRAINS, "mean": spread.mean, "std": spread.std, "seeds": seeds}
            | {"values": [by_seed[seed] for seed in seeds]}
        )
    return merged


def _columns(tests: Sequence[str]) -> dict[str, list[str]]:
    """Name of a row -> the test patterns that it is the mean of."""
    missing = [test for test in tests if test != COMPLETE]
    columns = {test: [test] for test in tests}
    return columns | ({MEAN_MISSING: missing} if len(missing) > 1 else {})


def _scores(document: Mapping[str, Any]) -> Mapping[str, Mapping[str, float]]:
    """The scores of the one model in a document of `launch/evaluate_run.py`."""
    return next(iter(document["models"].values()))


@dataclass
class Comparison:
    """Paired bootstrap of methods over the test samples.

    For every resample the same rows (of whole groups) are drawn for both methods, all seeds and all
    test patterns; the difference is taken within a seed and averaged over the seeds that both have.
    The interval is the percentile one. It speaks about new samples for these trained models; how
    the seeds scatter is in the table's standard deviation.

    Attributes:
        folder: of the grid.
        data: "problem_type", "label_names", "task" and "test_split" of the data.
        tests: test patterns.
        metric: the headline.
        num_resamples: R.
    """

    folder: Path
    data: Mapping[str, Any]
    tests: Sequence[str]
    metric: str
    num_resamples: int = 1000
    seed: int = 0
    _known: dict[Cell, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    def run(self, records: Records, *, reference: str) -> list[dict[str, Any]]:
        """Each method minus the reference, by training and test pattern.

        Returns:
            Rows {"method", "reference", "train", "test", "metric", "difference", "low", "high",
            "p", "seeds"}; p is two-sided. As in `table`, a row averages over training patterns.

        Raises:
            DataError: two models were scored on different samples.
        """
        groups: dict[tuple[str, str], dict[int, Cell]] = {}
        for cell in finished(records):
            groups.setdefault((cell.method.name, cell.train), {})[cell.seed] = cell
        rows: list[dict[str, Any]] = []
        missing: dict[str, list[np.ndarray]] = {}  # method -> (1 + R,) of each training pattern
        for (method, train), cells in groups.items():
            others = groups.get((reference, train), {})
            seeds = sorted(set(cells) & set(others))
            if method == reference or not seeds:
                continue
            pairs = [self._difference(cells[seed], others[seed]) for seed in seeds]
            difference = np.mean(pairs, axis=0)  # (tests, 1 + R)
            for test, conditions in _columns(self.tests).items():
                at = [list(self.tests).index(one) for one in conditions]
                rows.append(
                    {"method": method, "reference": reference, "train": train, "test": test}
                    | {"metric": self.metric, "seeds": seeds}
                    | interval_of(difference[at].mean(0))
                )
                if test == MEAN_MISSING:
                    missing.setdefault(method, []).append(difference[at].mean(0))
        trains = {train for _, train in groups}
        for method, differences in missing.items():
            if len(differences) == len(trains) > 1:
                rows.append(
                    {"method": method, "reference": reference, "train": ALL_TRAINS}
                    | {"test": MEAN_MISSING, "metric": self.metric, "seeds": None}
                    | interval_of(np.mean(differences, axis=0))
                )
        return rows

    def _difference(self, cell: Cell, other: Cell) -> np.ndarray:
        """Differences (tests, 1 + R) of two cells: on all rows, and on every resample."""
        (our_rows, ours), (their_rows, theirs) = self._values(cell), self._values(other)
        if not np.array_equal(our_rows, their_rows):
            raise DataError(
                f"cells {cell.folder_name!r} and {other.folder_name!r} were scored on different "
                "samples or groups of them; remove their folders and run the grid again."
            )
        return ours - theirs

    def _values(self, cell: Cell) -> tuple[np.ndarray, np.ndarray]:
        """Ids and groups (2, N), and values (tests, 1 + R) of one cell, resampled once."""
        if cell not in self._known:
            run = self.folder / "cells" / cell.folder_name / "run"
            file = PredictionFile.load(run / f"predictions-{self.data['test_split']}.npz")
            draws = {"num_resamples": self.num_resamples, "seed": self.seed}
            rows = list(draw_groups(file.groups, **draws))
            values = [self._resampled(file, test, rows) for test in self.tests]
            self._known[cell] = (np.stack([file.ids, file.groups]), np.array(values))
        return self._known[cell]

    def _resampled(self, file: PredictionFile, test: str, rows: list[np.ndarray]) -> np.ndarray:
        num_labels = len(self.data["label_names"])
        return resampled(
            file.logits[test],
            file.labels[test],
            rows=rows,
            metric=self.metric,
            problem_type=self.data["problem_type"],
            num_labels=1 if self.data["problem_type"] == "regression" else num_labels,
            task=self.data["task"],
        )
