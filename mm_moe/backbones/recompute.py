"""Blocks that are computed again in the backward pass instead of keeping their activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop


def recomputed(block: Callable[..., Any]) -> Callable[..., Any]:
    """A block that keeps its inputs only (activation checkpointing; Chen et al. 2016).

    The second pass runs to its end: torch would stop as soon as it has what the backward pass
    needs, which ranks with other rows may have at another place, and a rank that leaves out a
    collective hangs the others. What the second pass returns (losses, counts) is seen by nobody.
    """

    def run(*args: Any) -> Any:
        with set_checkpoint_early_stop(False):
            return checkpoint(block, *args, use_reentrant=False)

    return run


def wants_recompute(every: int, block: int, *, training: bool) -> bool:
    """Whether a block is computed twice: every `every`-th of them while training; 0 for none."""
    return bool(every) and training and torch.is_grad_enabled() and block % every == 0
