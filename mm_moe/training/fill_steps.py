"""Tells fills how many optimizer steps are done, for their warm-up."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback

from mm_moe.fill.base import Fill


class FillWarmUp(TrainerCallback):
    """Writes the step into the fills of a model; their weights are saved with it.

    Args:
        model: before anything is wrapped around it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.fills = [module for module in model.modules() if isinstance(module, Fill)]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the optimizer's step and before anything is scored or saved."""
        for fill in self.fills:
            fill.set_steps(state.global_step)
