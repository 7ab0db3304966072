"""A made clinical data set: labs, vitals, irregular events, and a survival time that they tell."""

from __future__ import annotations

import datasets
import numpy as np

from mm_moe.batch import Sample
from mm_moe.data.schema import DataSource

SIZES = {"train": 64, "validation": 24, "test": 32}
EVENTS = {"variables": ["hr", "ph"], "mean": [0.0, 0.0], "std": [1.0, 1.0], "hours": 48.0}


class ClinicalData(DataSource):
    """A hazard of exp(2 risk); labs and events show the risk, and a quarter lacks each."""

    name = "made_clinical"
    modalities = ("labs", "vitals", "events")
    label_names = ()
    problem_type = "survival"
    license = "none"
    sequences = {  # noqa: RUF012
        "labs": {"width": 3, "length": 1, "mean": [0.0] * 3, "std": [1.0] * 3},
        "vitals": {"width": 2, "length": 6, "mean": [0.0] * 2, "std": [1.0] * 2},
        "events": {"width": 3, "length": 5, "events": EVENTS},
    }

    def splits(self) -> tuple[str, ...]:
        return tuple(SIZES)

    def stream(self, split: str) -> datasets.IterableDataset:
        start = 1000 * list(SIZES).index(self.check_split(split))
        rows = [{"number": start + number} for number in range(SIZES[split])]
        return datasets.Dataset.from_list(rows).to_iterable_dataset()

    def to_sample(self, row: dict) -> Sample:
        number = row["number"]
        rng = np.random.default_rng(number)
        risk = rng.normal()
        time, censored = rng.exponential(np.exp(-2 * risk)), rng.exponential(3)
        hours = np.sort(rng.uniform(0, 48, size=5))
        events = np.stack([hours, rng.integers(2, size=5), risk + 0.3 * rng.normal(size=5)], 1)
        payload = {
            "labs": (risk + 0.3 * rng.normal(size=(1, 3))).astype(np.float32),
            "vitals": rng.normal(size=(rng.integers(2, 7), 2)).astype(np.float32),
            "events": events.astype(np.float32),
        }
        payload.pop({0: "labs", 1: "events"}.get(number % 4), None)
        return Sample(f"p{number}", payload, (float(min(time, censored)), int(time <= censored)))

    def size(self, split: str) -> int:
        return SIZES[split]

    def fingerprint(self) -> str:
        return "0" * 64
