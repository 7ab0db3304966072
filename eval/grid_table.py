"""The numbers of a grid: mean and spread over seeds, and paired comparisons over samples.

N labelled test rows, R resamples, C labels.
"""

from __future__ import annotations

import hashlib
import itertools
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
from eval.resamples import draw_groups, interval_of, over_seeds
from mm_moe.data.schema import ONE_VALUE
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


def _by_method_and_train(records: Records) -> dict[tuple[str, str], dict[int, Cell]]:
    """(method, training pattern) -> seed -> finished cell."""
    groups: dict[tuple[str, str], dict[int, Cell]] = {}
    for cell in finished(records):
        groups.setdefault((cell.method.name, cell.train), {})[cell.seed] = cell
    return groups


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
    _known: dict[Cell, tuple[str, np.ndarray]] = field(default_factory=dict)
    _draws: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def run(self, records: Records, *, reference: str) -> list[dict[str, Any]]:
        """Each method minus the reference, by training and test pattern.

        Returns:
            Rows {"method", "reference", "train", "test", "metric", "difference", "low", "high",
            "p", "seeds"}; p is two-sided. As in `table`, a row averages over training patterns.

        Raises:
            DataError: two models were scored on different samples.
        """
        groups = _by_method_and_train(records)
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

    def every_pair(self, records: Records) -> list[dict[str, Any]]:
        """Each method minus each earlier one, on average over the tests that lack something.

        Returns:
            Rows {"method", "other", "train", "test", "metric", "seeds", "values", "difference",
            "low", "high", "p", "seeds_low", "seeds_high"}: a difference for each seed that both
            methods have ("values"), their mean with its interval over samples (as in `run`), and
            with the one over seeds (`over_seeds`; None for one seed). With several training
            patterns, rows of `ALL_TRAINS` average over them and come first.

        Raises:
            DataError: as `run`.
        """
        groups = _by_method_and_train(records)
        missing = [at for at, test in enumerate(self.tests) if test != COMPLETE]
        trains = list(dict.fromkeys(train for _, train in groups))
        methods = list(dict.fromkeys(method for method, _ in groups))
        common: list[dict[str, Any]] = []
        single: list[dict[str, Any]] = []
        for other, method in itertools.combinations(methods, 2) if missing else ():
            of_train: dict[str, dict[int, np.ndarray]] = {}
            for train in trains:
                ours, theirs = (groups.get((name, train), {}) for name in (method, other))
                of_train[train] = {
                    seed: self._difference(ours[seed], theirs[seed])[missing].mean(0)
                    for seed in sorted(set(ours) & set(theirs))
                }
            seeds = sorted(set.intersection(*map(set, of_train.values())))
            mean = {seed: np.mean([of_train[t][seed] for t in trains], axis=0) for seed in seeds}
            if len(trains) > 1:
                common += self._pair(method, other, ALL_TRAINS, mean)
            for train, by_seed in of_train.items():
                single += self._pair(method, other, train, by_seed)
        return common + single

    def _pair(
        self, method: str, other: str, train: str, by_seed: Mapping[int, np.ndarray]
    ) -> list[dict[str, Any]]:
        """A row of `every_pair`, from (1 + R,) differences of each seed; none without a seed."""
        if not by_seed:
            return []
        values = [float(difference[0]) for difference in by_seed.values()]
        low, high = over_seeds(values) or (None, None)
        return [
            {"method": method, "other": other, "train": train, "test": MEAN_MISSING}
            | {"metric": self.metric, "seeds": list(by_seed), "values": values}
            | interval_of(np.mean(list(by_seed.values()), axis=0))
            | {"seeds_low": low, "seeds_high": high}
        ]

    def _difference(self, cell: Cell, other: Cell) -> np.ndarray:
        """Differences (tests, 1 + R) of two cells: on all rows, and on every resample."""
        (our_rows, ours), (their_rows, theirs) = self._values(cell), self._values(other)
        if our_rows != their_rows:
            raise DataError(
                f"cells {cell.folder_name!r} and {other.folder_name!r} were scored on different "
                "samples or groups of them; remove their folders and run the grid again."
            )
        return ours - theirs

    def _values(self, cell: Cell) -> tuple[str, np.ndarray]:
        """Hash of ids and groups, and values (tests, 1 + R) of one cell, resampled once."""
        if cell not in self._known:
            run = self.folder / "cells" / cell.folder_name / "run"
            file = PredictionFile.load(run / f"predictions-{self.data['test_split']}.npz")
            name = hashlib.sha256(file.ids.tobytes() + file.groups.tobytes()).hexdigest()
            if name not in self._draws:  # of all cells the same
                draws = {"num_resamples": self.num_resamples, "seed": self.seed}
                self._draws[name] = list(draw_groups(file.groups, **draws))
            values = [self._resampled(file, test, self._draws[name]) for test in self.tests]
            self._known[cell] = (name, np.array(values))
        return self._known[cell]

    def _resampled(self, file: PredictionFile, test: str, rows: list[np.ndarray]) -> np.ndarray:
        num_labels = len(self.data["label_names"])
        return resampled(
            file.logits[test],
            file.labels[test],
            rows=rows,
            metric=self.metric,
            problem_type=self.data["problem_type"],
            num_labels=1 if self.data["problem_type"] in ONE_VALUE else num_labels,
            task=self.data["task"],
        )
