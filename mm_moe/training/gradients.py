"""The gradients of a step as one process would see them, wherever ZeRO and the layout put them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.utils import safe_get_full_grad
from torch import Tensor

from mm_moe.checkpoint.logical import trainable_tensors
from mm_moe.moe.parallel_state import LogicalTensor


def full_gradients(engine: Any) -> dict[str, Tensor]:
    """Reduced, not yet clipped gradients (float32) by logical name, experts as global stacks.

    See `each_gradient`.
    """
    return {entry.name: grad.float().clone() for entry, grad in each_gradient(engine)}


def each_gradient(engine: Any) -> Iterator[tuple[LogicalTensor, Tensor]]:
    """(logical tensor, its reduced and not yet clipped gradient), one at a time.

    Call it between the backward of a step's last micro-batch and `engine.step()`. A collective:
    call it on every rank, to the end. At ZeRO-0 the gradients are on the parameters, at ZeRO 1 and
    2 they are put together from the ranks' partitions.

    Args:
        engine: a DeepSpeed engine at ZeRO stage 0, 1 or 2.
    """
    for entry in trainable_tensors(engine.module):
        yield entry, entry.gather([_gradient(part) for part in entry.parts])


def _gradient(parameter: Tensor) -> Tensor:
    grad = safe_get_full_grad(parameter)
    return torch.zeros_like(parameter) if grad is None else grad.detach()
