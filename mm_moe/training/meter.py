"""Sums what a training run reports between two log lines: loss parts, expert load, and speed.

E experts of a layer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from mm_moe.moe.layer import RoutingRecord
from mm_moe.training.runtime import gather_objects, world_size
from mm_moe.training.throughput import Sums, rates


class Meter:
    """Accumulates on every rank; `summary` gathers and resets, so every rank must call it."""

    def __init__(self) -> None:
        self.start()
        self.total_load: dict[str, Tensor] = {}

    def start(self) -> None:
        """Begin a new interval."""
        self._parts: dict[str, Any] = defaultdict(float)
        self._metrics: dict[str, dict[str, Any]] = {}
        self._load: dict[str, Tensor] = {}
        self._calls = 0

    def add(self, parts: Mapping[str, Tensor], routing: Mapping[str, RoutingRecord]) -> None:
        """Record one forward pass; nothing is read back from the device before `summary`.

        Args:
            parts: name -> scalar tensor of the loss.
            routing: layer name -> record.
        """
        self._calls += 1
        for name, value in parts.items():
            self._parts[name] += value.detach()
        for layer, record in routing.items():
            tokens_E = record.tokens_E.detach()
            before_E = self._load.get(layer)  # of a resumed run: still on the CPU
            self._load[layer] = tokens_E if before_E is None else before_E.to(tokens_E) + tokens_E
            sums = self._metrics.setdefault(layer, defaultdict(float))
            tokens = record.metrics.get("tokens", 1.0)  # without it each pass counts the same
            for name, value in record.metrics.items():
                sums[name] += value.double() * (1.0 if name == "tokens" else tokens)
            sums["weight"] += tokens

    def summary(self, speed: Sums) -> dict[str, float]:
        """Averages, sums and rates since the last call, over all ranks, by one collective.

        Keys: "loss/PART"; for each layer "moe/LAYER/expert_E" (rows that went to the expert),
        "moe/LAYER/tokens" (their sum), "moe/LAYER/load_imbalance" (max / mean rows per expert, 1 is
        even) and "moe/LAYER/METRIC" (mean over tokens of `RoutingRecord.metrics`);
        "moe/MODALITY/METRIC", the mean over the modality's layers; "moe/load_imbalance" of the
        worst layer; and the rates of `mm_moe.training.throughput`.

        Args:
            speed: what this rank did since the last call.
        """
        load = {layer: tokens_E.cpu() for layer, tokens_E in self._load.items()}
        parts = {name: float(value) for name, value in self._parts.items()}
        everyone = gather_objects((parts, load, self._calls, speed))
        logs: dict[str, float] = {}
        for name in everyone[0][0]:
            mean = sum(rank[0][name] / max(rank[2], 1) for rank in everyone) / world_size()
            logs[f"loss/{name}"] = mean
        for layer in everyone[0][1]:
            logs |= self._of_layer(layer, sum(rank[1][layer] for rank in everyone))
        logs |= _of_modalities(logs)
        worst = max((v for k, v in logs.items() if k.endswith("/load_imbalance")), default=0.0)
        if worst:
            logs["moe/load_imbalance"] = worst
        logs |= rates([rank[3] for rank in everyone])
        self.start()
        return logs

    def state_dict(self) -> dict[str, Any]:
        """What this rank has added up since the last log, and the load of the whole run."""
        return {
            "parts": {name: float(value) for name, value in self._parts.items()},
            "metrics": {
                layer: {name: float(value) for name, value in sums.items()}
                for layer, sums in self._metrics.items()
            },
            "load": {layer: tokens_E.cpu().clone() for layer, tokens_E in self._load.items()},
            "total_load": {name: load_E.clone() for name, load_E in self.total_load.items()},
            "calls": self._calls,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on adding where another process stopped; the clock starts now."""
        self.start()
        self._parts |= state["parts"]
        self._metrics = {
            layer: defaultdict(float, sums) for layer, sums in state["metrics"].items()
        }
        self._load = dict(state["load"])
        self.total_load = dict(state["total_load"])
        self._calls = state["calls"]

    def dealt(
        self, states: Sequence[dict[str, Any]], *, rank: int, world_size: int
    ) -> dict[str, Any]:
        """Rank 0 goes on with all counts of rows; parts are means over ranks."""
        count, first = len(states), states[0]
        return first | {
            "parts": {
                name: sum(state["parts"][name] for state in states) / count
                for name in first["parts"]
            },
            "load": {
                layer: sum(state["load"][layer] for state in states) * int(rank == 0)
                for layer in first["load"]
            },
        }

    def _of_layer(self, layer: str, tokens_E: Tensor) -> dict[str, float]:
        """What the log says of one layer. The metrics are over all ranks already."""
        self.total_load[layer] = self.total_load.get(layer, 0) + tokens_E
        found = {f"expert_{e}": float(rows) for e, rows in enumerate(tokens_E.tolist())}
        found["load_imbalance"] = float(tokens_E.max() / tokens_E.float().mean().clamp(min=1e-9))
        sums = {name: float(value) for name, value in self._metrics[layer].items()}
        weight = max(sums.pop("weight"), 1.0)
        for name, value in sums.items():
            found[name] = value if name == "tokens" else value / weight
        return {f"moe/{layer}/{name}": value for name, value in found.items()}


def _of_modalities(logs: Mapping[str, float]) -> dict[str, float]:
    """Means over the layers "MODALITY.BLOCK" of each modality; experts have no common meaning."""
    values: dict[str, list[float]] = defaultdict(list)
    for key, value in logs.items():
        room, _, rest = key.partition("/")
        layer, _, name = rest.partition("/")
        if room == "moe" and not name.startswith("expert_"):
            values[f"moe/{layer.rpartition('.')[0]}/{name}"].append(value)
    return {key: sum(several) / len(several) for key, several in values.items()}
