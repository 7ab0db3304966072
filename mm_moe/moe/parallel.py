"""Spread a finished model's experts over processes, on DeepSpeed's groups and parameter tags.

Each process of an expert-parallel group holds a contiguous slice of the experts and sends rows to
the others by an uneven all-to-all: counts first, then exactly the rows that there are. Every rank
enters every collective in the same order, forward and backward, however many rows it has.

P processes of an expert-parallel group, E experts, L = E / P experts per process, R rows, D width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import Tensor, nn

from mm_moe.errors import ParallelismError
from mm_moe.moe.batch_norm import BatchNorm
from mm_moe.moe.dispatch import Dispatcher
from mm_moe.moe.experts import Experts
from mm_moe.moe.layer import MoELayer, moe_layers
from mm_moe.moe.parallel_exchange import Exchange, Permute, SumOverRanks
from mm_moe.moe.parallel_placed import SpreadPlaced
from mm_moe.moe.parallel_state import (
    SpreadMoE,
    experts_apart,
    experts_together,
    gather_experts,
    is_expert_parameter,
    slice_experts,
)
from mm_moe.moe.parallel_stock import StockMoE, check_stock
from mm_moe.moe.placed import placed_layers
from mm_moe.moe.running_mean import RunningMean

__all__ = [
    "ExpertParallelDispatcher",
    "ExpertParallelMoE",
    "check_layout",
    "default_ep_size",
    "gather_experts",
    "is_expert_parameter",
    "make_expert_parallel",
    "moe_layers",
    "slice_experts",
]


def check_layout(*, num_experts: int, ep_size: int, world_size: int) -> None:
    """Check that `ep_size` splits both the experts and the processes evenly.

    Raises:
        ParallelismError: it does not; the message lists the sizes that do.
    """
    common = math.gcd(num_experts, world_size)
    fits = ", ".join(str(size) for size in range(1, common + 1) if common % size == 0)
    if ep_size < 1:
        raise ParallelismError(f"ep_size ({ep_size}) must be at least 1; possible: {fits}.")
    if world_size % ep_size:
        raise ParallelismError(
            f"the number of processes ({world_size}) must be a multiple of ep_size ({ep_size}); "
            f"possible with {num_experts} experts: {fits}."
        )
    if num_experts % ep_size:
        raise ParallelismError(
            f"moe.num_experts ({num_experts}) must be a multiple of ep_size ({ep_size}); "
            f"possible with {world_size} processes: {fits}."
        )


def default_ep_size(*, num_experts: int, world_size: int, local_world_size: int) -> int:
    """The largest expert-parallel size that splits experts and processes and stays in one node.

    At CLIP widths the exchange between nodes costs more than the experts' arithmetic.
    """
    return math.gcd(num_experts, world_size, local_world_size)


class ExpertParallelDispatcher(Dispatcher):
    """The experts are spread over the processes of a DeepSpeed expert-parallel group.

    Holds the group's name, not the group, so that a model can be copied and pickled.
    """

    def __init__(self, group_name: str) -> None:
        self.group_name = group_name

    def compute(self, x_RD: Tensor, tokens_E: Tensor, experts: Experts) -> Tensor:
        """Send rows to their experts' processes, compute there, and bring the outputs back."""
        group = groups._get_expert_parallel_group(self.group_name)
        size = dist.get_world_size(group)
        if size == 1:
            return experts(x_RD, tokens_E)
        sent_PL = tokens_E.view(size, -1)
        received_PL = torch.empty_like(sent_PL)
        dist.all_to_all_single(received_PL, sent_PL, group=group)
        send_P, receive_P = torch.stack([sent_PL.sum(1), received_PL.sum(1)]).tolist()
        arrived_RD = Exchange.apply(x_RD, send_P, receive_P, group)
        # rows arrive sorted by (process, expert); the experts want (expert, process)
        expert_R = torch.arange(received_PL.shape[1], device=x_RD.device).repeat(size)
        expert_R = expert_R.repeat_interleave(received_PL.flatten(), output_size=len(arrived_RD))
        order_R = torch.argsort(expert_R, stable=True)
        back_R = torch.empty_like(order_R)
        back_R[order_R] = torch.arange(len(order_R), device=x_RD.device)
        y_RD = experts(Permute.apply(arrived_RD, order_R, back_R), received_PL.sum(0))
        return Exchange.apply(Permute.apply(y_RD, back_R, order_R), receive_P, send_P, group)

    def sum_over_ranks(self, totals: Tensor) -> Tensor:
        """Differentiable sum over all processes of the run."""
        return SumOverRanks.apply(totals)

    def gather_over_ranks(self, rows: Tensor) -> tuple[Tensor, int]:
        """Rows of all processes of the run: counts first, then rows padded to the longest part."""
        count = torch.tensor([len(rows)], device=rows.device)
        counts = [torch.empty_like(count) for _ in range(dist.get_world_size())]
        dist.all_gather(counts, count)
        sizes = torch.cat(counts).tolist()
        padded = rows.new_zeros(max(sizes), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        whole = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
        return whole, sum(sizes[: dist.get_rank()])


class ExpertParallelMoE(SpreadMoE, MoE):
    """A sparse layer that holds this process' slice of the experts.

    DeepSpeed's engine recognises it as its own `MoE`: it reduces the gradients of the experts over
    the expert-data group and those of the router over all processes, and its `save_checkpoint` and
    `load_checkpoint` keep one file per expert. The names in the state dict are those of `MoELayer`;
    expert tensors have a shorter first dimension.

    Args:
        layer: the whole layer, identical on every process.
        ep_size: processes that share the experts.

    Raises:
        ParallelismError: `ep_size` does not split the experts or the processes.
    """

    def __init__(self, layer: MoELayer, *, ep_size: int) -> None:
        # no base class is initialised: one would draw new weights, the other build its experts
        nn.Module.__init__(self)
        check_layout(
            num_experts=layer.num_experts, ep_size=ep_size, world_size=dist.get_world_size()
        )
        self._take_part(layer, ep_size=ep_size)
        for name, child in layer.named_children():  # router and what works beside the experts
            self.add_module(name, child)
        if layer.companion is None:
            self.companion = None
        self.experts = layer.experts.slice(
            self.first_expert, self.first_expert + self.num_local_experts
        )
        for parameter in self.experts.parameters():
            tags = {"allreduce": False, "group_name": self.expert_group_name}
            vars(parameter).update(tags)  # what DeepSpeed reads
        self.dispatcher = ExpertParallelDispatcher(self.expert_group_name)
        self.train(layer.training)

    def state_dict(
        self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> Any:
        """As of any module, but asked for this layer alone, the experts are named one by one.

        That is how DeepSpeed's engine asks when it writes one file per expert; a model's state dict
        passes a destination, and gets the stacks. Both kinds of names can be loaded.
        """
        alone = destination is None and not prefix and not args
        state = super().state_dict(
            *args, destination=destination, prefix=prefix, keep_vars=keep_vars
        )
        return experts_apart(state) if alone else state

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        names = [name for name, _ in self.experts.named_parameters()]
        experts_together(state_dict, prefix=prefix, names=names, count=self.num_local_experts)
        super()._load_from_state_dict(state_dict, prefix, *args)


BACKENDS: dict[str, type[ExpertParallelMoE | StockMoE]] = {
    "ours": ExpertParallelMoE,
    "deepspeed": StockMoE,
}


def make_expert_parallel(model: nn.Module, *, ep_size: int, backend: str = "ours") -> nn.Module:
    """Replace each `MoELayer` and `PlacedExperts` by one that holds this process' experts.

    Call it on every rank, after `torch.distributed` is up, on a finished model that is identical on
    all ranks; then hand the model to DeepSpeed. Also at `ep_size` 1, so that the engine treats
    every layout alike and the losses see the tokens of all ranks.

    Args:
        model: the model, or one sparse layer.
        ep_size: processes that share one set of experts.
        backend: "ours", or "deepspeed" for DeepSpeed's own layer (`parallel_stock`).

    Returns:
        The same model, changed in place (or the new layer, if the model is one).

    Raises:
        ParallelismError: `ep_size` does not split the experts of a layer or the processes, the
            model is expert-parallel already, or the backend is unknown or cannot do what the
            settings ask for.
    """
    layers = moe_layers(model)
    placed = placed_layers(model)
    if backend not in BACKENDS:
        raise ParallelismError(f"unknown backend {backend!r}; take one of {', '.join(BACKENDS)}.")
    for name, layer in layers.items():
        if backend == "deepspeed":
            check_stock(layer.settings)
        if isinstance(layer, SpreadMoE):
            raise ParallelismError(f"layer {name!r} is expert-parallel already; build a new model.")
        check_layout(
            num_experts=layer.num_experts, ep_size=ep_size, world_size=dist.get_world_size()
        )
    for name, experts in placed.items():
        if isinstance(experts, SpreadPlaced):
            raise ParallelismError(f"layer {name!r} is expert-parallel already; build a new model.")
        check_layout(
            num_experts=len(experts.names), ep_size=ep_size, world_size=dist.get_world_size()
        )
    if dist.get_world_size() > 1:
        for module in model.modules():
            if isinstance(module, BatchNorm | RunningMean):
                module.sum_over_ranks = SumOverRanks.apply
    for name, layer in layers.items():
        replacement = BACKENDS[backend](layer, ep_size=ep_size)
        if not name:
            return replacement
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, replacement)
    for name, experts in placed.items():
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, SpreadPlaced(experts, ep_size=ep_size))
    return model
