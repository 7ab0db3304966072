"""Sums what a training run reports between two log lines: loss parts, expert load, speed.

E experts of a layer.
"""

from __future__ import annotations

import time
from collections import defaultdict

import torch

from mm_moe.training.runtime import gather_objects, world_size


class Meter:
    """Accumulates on every rank; `summary` gathers and resets, so every rank must call it."""

    def __init__(self) -> None:
        self.start()
        self.total_load: dict[str, torch.Tensor] = {}

    def start(self) -> None:
        """Begin a new interval."""
        self._parts: dict[str, float] = defaultdict(float)
        self._metrics: dict[str, float] = defaultdict(float)
        self._load: dict[str, torch.Tensor] = {}
        self._calls = 0
        self._rows = 0
        self._since = time.perf_counter()

    def add(self, parts: dict, routing: dict, *, rows: int) -> None:
        """Record one forward pass.

        Args:
            parts: name -> scalar tensor of the loss.
            routing: layer name -> `RoutingRecord`.
            rows: samples of this rank.
        """
        self._calls += 1
        self._rows += rows
        for name, value in parts.items():
            self._parts[name] += float(value.detach())
        for layer, record in routing.items():
            tokens_E = record.tokens_E.detach().cpu()
            self._load[layer] = self._load.get(layer, torch.zeros_like(tokens_E)) + tokens_E
            for name, value in record.metrics.items():
                self._metrics[f"moe/{layer}/{name}"] += float(value)

    def summary(self) -> dict[str, float]:
        """Averages and rates since the last call, over all ranks.

        Keys: "loss/PART", "moe/LAYER/load_imbalance" (max / mean rows per expert, 1 is even),
        "moe/LAYER/METRIC", "moe/load_imbalance" (worst layer), "perf/samples_per_second".
        """
        mine = (dict(self._parts), dict(self._metrics), self._load, self._calls, self._rows)
        everyone = gather_objects(mine)
        elapsed = time.perf_counter() - self._since
        logs: dict[str, float] = {}
        for index, prefix in ((0, "loss/"), (1, "")):
            for name in everyone[0][index]:
                mean = sum(part[index][name] / max(part[3], 1) for part in everyone) / world_size()
                logs[prefix + name] = mean
        worst = 0.0
        for layer in everyone[0][2]:
            tokens_E = sum(part[2][layer] for part in everyone)
            self.total_load[layer] = self.total_load.get(layer, 0) + tokens_E
            imbalance = float(tokens_E.max() / tokens_E.float().mean().clamp(min=1e-9))
            logs[f"moe/{layer}/load_imbalance"] = imbalance
            worst = max(worst, imbalance)
        if worst:
            logs["moe/load_imbalance"] = worst
        logs["perf/samples_per_second"] = sum(part[4] for part in everyone) / max(elapsed, 1e-9)
        self.start()
        return logs
