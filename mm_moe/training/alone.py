"""What DeepSpeed exchanges between processes, left out where there is only one.

DeepSpeed 0.19.8 copies every gradient into a bucket, divides it by the number of processes,
flattens the bucket, reduces it, copies the result back and then into the partition, for one process
like for many. The sum over one process is the gradient itself, so the numbers stay the same to the
last bit.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


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


def _fill(engine: Any) -> None:
    engine._get_gradients_for_reduction()


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In the place of an exchange with nobody."""
