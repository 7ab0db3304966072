"""A running mean over the rows of all processes.

It knows no ranks: as with `BatchNorm`, what it sums is summed over them by a function that
`make_expert_parallel` swaps in.

Axes: M groups, any value shape behind it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class RunningMean(nn.Module):
    """One running mean per group, of values of one shape.

    The first batch sets a group's mean; later ones move it by `momentum`. A group without a row in
    a batch keeps its mean, and one that never had any has mean 0.

    Args:
        size: (M, ...).
        momentum: share of a batch's mean in the running one.
    """

    mean: Tensor
    batches_M: Tensor

    def __init__(self, size: tuple[int, ...], *, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("batches_M", torch.zeros(size[0], dtype=torch.int64))
        self.sum_over_ranks: Callable[[Tensor], Tensor] | None = None  # None: there is one process

    @torch.no_grad()
    def update(self, sums: Tensor, count_M: Tensor) -> None:
        """Take in a batch; every process calls it, also without rows.

        Args:
            sums: (M, ...), of this process' rows.
            count_M: number of these rows.
        """
        sums = sums if sums.dtype == torch.float64 else sums.float()
        total = torch.cat([sums.flatten(1), count_M.to(sums.dtype)[:, None]], 1)
        if self.sum_over_ranks is not None:
            total = self.sum_over_ranks(total)
        seen_M = total[:, -1] > 0
        new = (total[:, :-1] / total[:, -1:].clamp(min=1)).view(self.mean.shape)
        share_M = torch.where(self.batches_M == 0, 1.0, self.momentum) * seen_M
        share = share_M.view(-1, *[1] * (new.ndim - 1)).to(new.dtype)
        self.mean.copy_(torch.lerp(self.mean.to(new.dtype), new, share))
        self.batches_M += seen_M
