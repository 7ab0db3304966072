"""Objectives that have a life of their own beside the model: discriminators, annealed weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from mm_moe.batch import Batch
from mm_moe.training.carried import Carried


class StatefulObjective(ABC):
    """An objective whose state goes on from step to step and into the checkpoints.

    It is made from flags, before there is a model; `prepare` is called once the model is whole, or
    spread over the ranks.
    """

    @abstractmethod
    def __call__(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Any]:
        """Return (loss, parts of it for the log, the model's output)."""

    @abstractmethod
    def prepare(self, model: nn.Module, *, device: torch.device, seed: int) -> None:
        """Make what needs the model; the same on every rank, but for what belongs to experts."""

    @abstractmethod
    def carried(self) -> dict[str, Carried]:
        """The parts that checkpoints hold."""

    @abstractmethod
    def callbacks(self) -> list[TrainerCallback]:
        """What has to hear of the steps."""
