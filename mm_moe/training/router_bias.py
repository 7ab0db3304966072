"""Balancing without a loss: routers' biases move after each optimizer step.

Source: DeepSeek-V3 (2024), Wang et al. 2024.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from mm_moe.moe.layer import MoELayer, RoutingRecord


class BiasUpdate(TrainerCallback):
    """Adds up the loads of an optimizer step's passes, then moves the biases by them.

    A record's load is that of all ranks, so every rank makes the same update. Only the records that
    a training step hands in count: not those of an evaluation, and not the second forward pass of
    gradient checkpointing, whose records nobody sees.

    Args:
        layers: "<modality>.<block>" -> sparse layer; those without a `bias_update_rate` are left
            alone.
    """

    def __init__(self, layers: Mapping[str, MoELayer]) -> None:
        self.layers = {
            name: layer for name, layer in layers.items() if layer.settings.bias_update_rate
        }
        self._load: dict[str, Tensor] = {}

    def add(self, routing: Mapping[str, RoutingRecord]) -> None:
        """Count the choices of one training pass."""
        for name in self.layers:
            load_E = routing[name].load_E
            assert load_E is not None  # a layer with such a router reports it
            self._load[name] = self._load[name] + load_E if name in self._load else load_E

    def forget(self) -> None:
        """Drop what was counted: the optimizer step is skipped, and the biases stay with it."""
        self._load.clear()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the optimizer's step and before anything is saved: one step for each bias."""
        total: dict[MoELayer, Tensor] = {}  # a layer may serve several modalities
        for name, load_E in self._load.items():
            layer = self.layers[name]
            total[layer] = total[layer] + load_E if layer in total else load_E
        for layer, load_E in total.items():
            layer.router.update_bias(load_E)
        self._load.clear()
