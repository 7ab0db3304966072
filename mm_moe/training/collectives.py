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


class _FetchRows(torch.autograd.Function):
    """Uneven all-to-all of chosen rows; the backward sends their gradients home and adds them."""

    @staticmethod
    def forward(ctx, rows_BD: Tensor, wanted_N: Tensor) -> Tensor:
        world, count = dist.get_world_size(), len(rows_BD)
        order_N = torch.argsort(wanted_N, stable=True)
        sorted_N = wanted_N[order_N]
        ask_P = torch.bincount(sorted_N.div(count, rounding_mode="floor"), minlength=world)
        asked_P = torch.empty_like(ask_P)
        dist.all_to_all_single(asked_P, ask_P)
        ctx.ask, ctx.asked = ask_P.tolist(), asked_P.tolist()
        places = sorted_N.new_empty(sum(ctx.asked))
        dist.all_to_all_single(places, sorted_N % count, ctx.asked, ctx.ask)
        found_ND = rows_BD.new_empty(len(wanted_N), rows_BD.shape[1])
        dist.all_to_all_single(found_ND, rows_BD[places], ctx.ask, ctx.asked)
        ctx.save_for_backward(order_N, places)
        ctx.count = count
        return torch.empty_like(found_ND).index_copy_(0, order_N, found_ND)

    @staticmethod
    def backward(ctx, grad_ND: Tensor) -> tuple[Tensor, None]:
        order_N, places = ctx.saved_tensors
        arrived = grad_ND.new_empty(len(places), grad_ND.shape[1])
        dist.all_to_all_single(arrived, grad_ND[order_N].contiguous(), ctx.asked, ctx.ask)
        home_BD = grad_ND.new_zeros(ctx.count, grad_ND.shape[1])
        return home_BD.index_add_(0, places, arrived), None


def fetch_rows(rows_BD: Tensor, wanted_N: Tensor) -> Tensor:
    """Some of all ranks' rows (N, D), which are numbered in rank order; differentiable.

    Only what is asked for travels. Every rank calls it, with equally many rows of its own and any
    number of wishes.
    """
    if num_ranks() == 1:
        return rows_BD[wanted_N]
    fetched: Tensor = _FetchRows.apply(rows_BD, wanted_N)  # type: ignore[no-untyped-call]
    return fetched


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


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum over all ranks; not differentiable."""
    if num_ranks() == 1:
        return values
    total = values.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


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
