"""What DeepSpeed exchanges between processes, left out where there is only one.

DeepSpeed 0.19.8 copies every gradient into a bucket, divides it by the number of processes,
flattens the bucket, reduces it, copies the result back and then into the partition, for one process
like for many, and takes the norm of a float64 copy. The sum over one process is the gradient
itself, so the gradients stay the same to the last bit. So does the norm, but for gradients of
65,536 elements and more, where it stays within 1e-7 (`mm_moe.training.clip.squared_norm`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mm_moe.training.clip import squared_norm


def skip_exchanges(engine: Any) -> None:
    """Let an engine of one process take each gradient as backward left it.

    Does nothing with more processes, with an optimizer on the host (its gradients have to travel),
    and where gradients are added up in another type than they are computed in.

    Args:
        engine: a DeepSpeed engine at ZeRO stage 0, 1 or 2, before its first step.
    """
    if dist.get_world_size() > 1:
        return
    if not engine.zero_optimization():
        # this still gives a parameter that took no part in the step a gradient of zero
        engine.buffered_allreduce_fallback = lambda *args, **kwargs: _fill(engine)
        return
    optimizer = engine.optimizer
    if optimizer.cpu_offload or optimizer.gradient_accumulation_dtype != optimizer.dtype:
        return
    optimizer.reduce_independent_p_g_buckets_and_remove_grads = _nothing
    optimizer.get_grad_norm_direct = _norm


def _fill(engine: Any) -> None:
    engine._get_gradients_for_reduction()


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In the place of an exchange with nobody."""


def _norm(gradients: Iterable[Tensor], params: Any, norm_type: int = 2) -> Tensor:
    """L2 norm of a group's gradients as DeepSpeed gives it: -1 if it is not finite."""
    own = [grad for grad in gradients if not getattr(grad, "_zero_padding", False)]
    norm = torch.stack([squared_norm(grad) for grad in own]).sum().float().sqrt()
    return torch.where(torch.isfinite(norm), norm, -1.0)
