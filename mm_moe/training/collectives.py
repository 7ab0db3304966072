"""Exchange of rows between ranks, for objectives that compare samples.

B rows of this rank, G rows of all ranks, D width.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class _GatherRows(torch.autograd.Function):
    """All ranks' rows in rank order; the backward sums what every rank asks of this rank's rows."""

    @staticmethod
    def forward(ctx, rows_BD: Tensor) -> Tensor:
        parts = [torch.empty_like(rows_BD) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows_BD.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad_GD: Tensor) -> Tensor:
        total_GD = grad_GD.contiguous().clone()
        dist.all_reduce(total_GD)
        return total_GD.chunk(dist.get_world_size())[dist.get_rank()]


def gather_rows(rows_BD: Tensor) -> tuple[Tensor, int]:
    """(all ranks' rows (G, D), index of this rank's first row); every rank gives equally many rows.

    With each rank's loss averaged over ranks (as DeepSpeed averages gradients), the gradient is
    exactly that of the loss over the global batch.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows_BD, 0
    return _GatherRows.apply(rows_BD), dist.get_rank() * len(rows_BD)


def num_ranks() -> int:
    """Processes that take part in an exchange; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def shift_rows(rows_BD: Tensor) -> Tensor:
    """The rows of the rank before this one; this rank's go to the next: one step of a ring.

    Not differentiable: who uses it sends gradients around by hand. Equally shaped on every rank.
    """
    world = num_ranks()
    if world == 1 or not rows_BD.numel():
        return rows_BD
    rank = dist.get_rank()
    arriving_BD = torch.empty_like(rows_BD, memory_format=torch.contiguous_format)
    pending = dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, rows_BD.contiguous(), (rank + 1) % world),
            dist.P2POp(dist.irecv, arriving_BD, (rank - 1) % world),
        ]
    )
    for exchange in pending:
        exchange.wait()
    return arriving_BD


def mean_weight(count: Tensor, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Factor from a sum over this rank's rows to its share of the mean over all ranks' rows.

    Args:
        count: number of rows that count on this rank, a scalar tensor.
        dtype: of the factor.
    """
    total = count.detach().to(dtype).clone()
    if num_ranks() > 1:
        dist.all_reduce(total)
    return num_ranks() / total.clamp(min=1)
