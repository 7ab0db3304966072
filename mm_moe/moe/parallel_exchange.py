"""Exchanges between processes through which gradients go back, each the same on every rank.

P processes of a group, R rows, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


class SumOverRanks(torch.autograd.Function):
    """All-reduce SUM forward and backward.

    Every rank computes the same loss from the totals. The sum of their gradients is P times the
    gradient of that one loss, and the mean over ranks that DeepSpeed takes makes it exact.
    """

    @staticmethod
    def forward(ctx: Any, totals: Tensor) -> Tensor:
        """Sum."""
        totals = totals.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(totals)
        return totals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Sum of the gradients."""
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad


class Exchange(torch.autograd.Function):
    """Uneven all-to-all of rows; backward sends the gradients the same way back."""

    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, send_P: list[int], receive_P: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        """Send the rows."""
        ctx.send_P, ctx.receive_P, ctx.group = send_P, receive_P, group
        return exchange_rows(x_RD, send_P, receive_P, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """Send the gradients back."""
        return exchange_rows(grad, ctx.receive_P, ctx.send_P, ctx.group), None, None, None


def exchange_rows(
    x_RD: Tensor, send_P: list[int], receive_P: list[int], group: dist.ProcessGroup
) -> Tensor:
    """Rows that arrive where each process sends rows to each other one; no gradient."""
    out_RD = x_RD.new_empty(sum(receive_P), x_RD.shape[1])
    dist.all_to_all_single(out_RD, x_RD.contiguous(), receive_P, send_P, group=group)
    return out_RD


class Permute(torch.autograd.Function):
    """Reorder rows; backward is the inverse gather instead of a scatter with atomic adds."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
        """Reorder."""
        ctx.save_for_backward(inverse_R)
        return x_RD.index_select(0, order_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        """Order as before."""
        (inverse_R,) = ctx.saved_tensors
        return grad_RD.index_select(0, inverse_R), None, None


class SumOverGroup(torch.autograd.Function):
    """All-reduce SUM over a group, forward and backward.

    For totals whose users' losses are added up over the group, as statistics of a layer are.
    """

    @staticmethod
    def forward(ctx: Any, totals: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Sum."""
        ctx.group = group
        totals = totals.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(totals, group=group)
        return totals

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Sum of the gradients."""
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.group)
        return grad, None
