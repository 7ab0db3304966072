"""Where a judge of steps takes hold of DeepSpeed's engine, and what it looks at and puts back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from mm_moe.moe.batch_norm import BatchNorm
from mm_moe.training.clip import global_norm
from mm_moe.training.gradients import each_gradient

Judge = Callable[[Tensor | float], bool]


def put_before_optimizer(engine: Any, judge: Judge) -> None:
    """Let `judge(gradient norm)` decide, once a step and on every rank, whether a step is taken.

    Args:
        engine: a DeepSpeed engine at ZeRO stage 0, 1 or 2, with `clip_without_zero` done.
        judge: gets the norm of all gradients before clipping, -1 if any is not finite.
    """
    if engine.zero_optimization():
        _before_zero(engine.optimizer, judge)
    else:
        _before_plain(engine, judge)


def _before_zero(optimizer: Any, judge: Judge) -> None:
    """ZeRO 1 and 2 ask for overflow first: the norm answers that too, and is computed only once.

    What DeepSpeed does on an overflow (gradients cleared, nothing else touched) is what a skipped
    step needs. It is forgotten afterwards, or the learning-rate schedule would wait for this step.
    """
    measure, take = optimizer.scaled_global_norm, optimizer.step
    found: dict[str, Tensor] = {}

    def check(partition_gradients: bool = True) -> None:
        found["norm"] = torch.as_tensor(measure())
        optimizer.overflow = not judge(found["norm"])

    @functools.wraps(take)
    def step(closure: Any = None) -> None:
        take()
        if optimizer.overflow:
            optimizer.overflow = False
            shown = found["norm"]  # DeepSpeed says infinite whatever it was
            optimizer._global_grad_norm = shown if shown >= 0 else torch.full_like(shown, torch.inf)

    optimizer.check_grad_overflow = True
    optimizer.check_overflow = check
    optimizer.scaled_global_norm = lambda norm_type=2: found["norm"]
    optimizer.step = step


def _before_plain(engine: Any, judge: Judge) -> None:
    """ZeRO 0: the optimizer's own step is left out; the engine clears the gradients after it."""
    optimizer = engine.optimizer
    take = optimizer.step
    parameters = [entry for entry in engine.module.parameters() if entry.requires_grad]

    @functools.wraps(take)  # carries the mark that the schedule looks for
    def step(closure: Any = None) -> None:
        if engine.gradient_clipping() > 0:
            norm = engine._global_grad_norm
        else:
            norm = global_norm(parameters)
        if judge(norm):
            take()
        optimizer._opt_called = True  # a skipped first step is no schedule in the wrong order

    optimizer.step = step


def nonfinite_gradients(engine: Any) -> list[str]:
    """Trainable parameters whose gradient is not finite, those of experts with their numbers.

    A collective over all ranks, one tensor at a time, before the gradients are cleared.
    """
    found = []
    for entry, grad in each_gradient(engine):
        if torch.isfinite(grad).all():
            continue
        words = entry.name
        if entry.owner is not None:
            bad_E = ~torch.isfinite(grad.flatten(1)).all(1)
            numbers = ", ".join(str(e) for e in bad_E.nonzero().flatten().tolist())
            words += f" of expert {numbers}"
        found.append(words)
    return found


@torch.no_grad()
def keep_statistics(model: nn.Module) -> Callable[[], None]:
    """Copy the batch-norm statistics that training passes change; returns what puts them back."""
    kinds = (BatchNorm, _NormBase)
    kept = [
        (buffer, buffer.clone())
        for module in model.modules()
        if isinstance(module, kinds) and module.training
        for buffer in module.buffers(recurse=False)
    ]

    @torch.no_grad()
    def put_back() -> None:
        for buffer, value in kept:
            buffer.copy_(value)

    return put_back
