"""Batch normalisation over the rows of all processes.

Like a sparse layer, it knows no ranks: what it sums is summed over them by a function that
`make_expert_parallel` swaps in. So a model with it has the same numbers on any number of processes.

Axes: N rows, C channels, S places of a channel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BatchNorm(nn.Module):
    """`torch.nn.BatchNorm2d` over the real rows of all processes.

    In training the statistics are those of the rows of all processes; a process without rows runs
    one blank row, which counts nothing. Without a real row anywhere the running statistics are used
    and stay as they are.

    Args:
        channels: C.
        momentum: share of the new statistics in the running ones.
        eps: added to the variance.
    """

    running_mean_C: Tensor
    running_var_C: Tensor

    def __init__(self, channels: int, *, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean_C", torch.zeros(channels))
        self.register_buffer("running_var_C", torch.ones(channels))
        self.sum_over_ranks: Callable[[Tensor], Tensor] | None = None  # None: there is one process
        self.remembers = True

    def forward(self, x_NCHW: Tensor, *, blank: bool = False) -> Tensor:
        """Normalised channels, shaped as `x_NCHW`; `blank` marks the blank row."""
        if not self.training or (blank and self.sum_over_ranks is None):
            return self._by_running(x_NCHW)
        if self.sum_over_ranks is None and x_NCHW.numel() > x_NCHW.shape[1]:
            return F.batch_norm(
                x_NCHW,
                self.running_mean_C,
                self.running_var_C,
                self.weight,
                self.bias,
                training=True,
                momentum=self.momentum if self.remembers else 0.0,
                eps=self.eps,
            )
        return self._by_batch(x_NCHW, blank=blank)

    def _by_running(self, x_NCHW: Tensor) -> Tensor:
        mean_C, var_C = self.running_mean_C, self.running_var_C
        if self.training:  # a later pass of the same step may change them
            mean_C, var_C = mean_C.clone(), var_C.clone()
        return F.batch_norm(x_NCHW, mean_C, var_C, self.weight, self.bias, eps=self.eps)

    def _by_batch(self, x_NCHW: Tensor, *, blank: bool) -> Tensor:
        x_CS = x_NCHW.transpose(0, 1).flatten(1)
        x_CS = x_CS if x_CS.dtype == torch.float64 else x_CS.float()
        weight = 0.0 if blank else 1.0
        count_1 = x_CS.new_full((1,), weight * x_CS.shape[1])
        total = self._sum(torch.cat([count_1, weight * x_CS.sum(1)]))
        count = total[0].detach()
        mean_C = total[1:] / count.clamp(min=1)
        centred_CS = x_CS - mean_C[:, None]
        var_C = self._sum(weight * centred_CS.square().sum(1)) / count.clamp(min=1)
        if count == 0:  # on every process
            return self._by_running(x_NCHW)
        self._remember(mean_C.detach(), var_C.detach(), count)
        scale_C = self.weight * torch.rsqrt(var_C + self.eps)
        y_CS = centred_CS * scale_C[:, None] + self.bias[:, None]
        return y_CS.unflatten(1, (-1, *x_NCHW.shape[2:])).transpose(0, 1).to(x_NCHW.dtype)

    def _sum(self, values: Tensor) -> Tensor:
        return values if self.sum_over_ranks is None else self.sum_over_ranks(values)

    @torch.no_grad()
    def _remember(self, mean_C: Tensor, var_C: Tensor, count: Tensor) -> None:
        if not self.remembers:
            return
        unbiased_C = var_C * (count / (count - 1).clamp(min=1))
        # as data: an earlier pass of the same step keeps them for its backward, and reads nothing
        self.running_mean_C.data.lerp_(mean_C.to(self.running_mean_C.dtype), self.momentum)
        self.running_var_C.data.lerp_(unbiased_C.to(self.running_var_C.dtype), self.momentum)


@contextmanager
def forgetting(*modules: nn.Module) -> Iterator[None]:
    """Rows that are no data: batch norms inside use their statistics and do not keep them."""
    found = [m for one in modules for m in one.modules() if isinstance(m, BatchNorm)]
    for norm in found:
        norm.remembers = False
    try:
        yield
    finally:
        for norm in found:
            norm.remembers = True
