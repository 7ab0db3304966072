"""Placed experts spread over processes, on DeepSpeed's groups and parameter tags.

Each process of an expert-parallel group holds some experts whole, and rows travel by uneven
all-to-all. All processes hold parameters of the same shapes: each in the largest shape that any
process has at that place, with zeros behind an expert's own part. DeepSpeed's ZeRO puts dense and
expert gradients into common buckets and empties them when they are full; were the sizes unlike,
the processes would empty them at different moments and reduce different things together. The
largest expert sets the memory that a process needs in any case.

P processes of an expert-parallel group, E experts, L = E / P experts per process, R rows, T entries
of all rows together.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from torch import Tensor, nn

from mm_moe.moe.batch_norm import BatchNorm
from mm_moe.moe.parallel_exchange import Exchange, Permute, SumOverGroup
from mm_moe.moe.placed import LocalPlan, PlacedExperts, Placement, Plan


class SpreadPlan(Plan):
    """Rows of a batch on their way; made by a collective of the expert-parallel group."""

    def __init__(self, rows_E: Tensor, group: dist.ProcessGroup) -> None:
        self.group, size = group, dist.get_world_size(group)
        sent_PL = rows_E.view(size, -1)
        received_PL = torch.empty_like(sent_PL)
        dist.all_to_all_single(received_PL, sent_PL.contiguous(), group=group)
        self.send_P, self.receive_P = torch.stack([sent_PL.sum(1), received_PL.sum(1)]).tolist()
        self.counts = received_PL.sum(0).tolist()
        # rows arrive sorted by (process, expert); the experts want (expert, process)
        expert_R = torch.arange(received_PL.shape[1], device=rows_E.device).repeat(size)
        expert_R = expert_R.repeat_interleave(received_PL.flatten())
        self.order_R = torch.argsort(expert_R, stable=True)
        self.back_R = torch.empty_like(self.order_R)
        self.back_R[self.order_R] = torch.arange(len(expert_R), device=rows_E.device)

    def send(self, x: Tensor) -> Tensor:
        """Exchange, then sort by expert."""
        arrived = Exchange.apply(x, self.send_P, self.receive_P, self.group)
        return Permute.apply(arrived, self.order_R, self.back_R)

    def back(self, y: Tensor) -> Tensor:
        """Sort by process, then exchange."""
        sorted_ = Permute.apply(y, self.back_R, self.order_R)
        return Exchange.apply(sorted_, self.receive_P, self.send_P, self.group)

    def send_entries(self, entries: Tensor, per_row: Tensor) -> tuple[Tensor, Tensor]:
        """Lengths first, then exactly the entries that there are."""
        arrived_R = per_row.new_empty(sum(self.receive_P))
        dist.all_to_all_single(
            arrived_R, per_row.contiguous(), self.receive_P, self.send_P, group=self.group
        )
        send_P = [int(part.sum()) for part in per_row.split(self.send_P)]
        receive_P = [int(part.sum()) for part in arrived_R.split(self.receive_P)]
        arrived = entries.new_empty(sum(receive_P))
        dist.all_to_all_single(arrived, entries.contiguous(), receive_P, send_P, group=self.group)
        begin_R = arrived_R.cumsum(0) - arrived_R
        length_R = arrived_R[self.order_R]
        shift_R = begin_R[self.order_R] - (length_R.cumsum(0) - length_R)
        places_T = torch.arange(len(arrived), device=arrived.device)
        return arrived[shift_R.repeat_interleave(length_R) + places_T], length_R


class SpreadPlacement(Placement):
    """The experts are spread over a DeepSpeed expert-parallel group.

    Holds the group's name, not the group, so that a model can be copied and pickled.
    """

    def __init__(self, group_name: str) -> None:
        self.group_name = group_name

    def plan(self, rows_E: Tensor) -> Plan:
        """Tell the holders how many rows come."""
        group = groups._get_expert_parallel_group(self.group_name)
        if dist.get_world_size(group) == 1:
            return LocalPlan(rows_E)
        return SpreadPlan(rows_E, group)

    def sum_over_holders(self, values: Tensor) -> Tensor:
        """Sum over the expert-data group."""
        total = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=groups._get_expert_data_parallel_group(self.group_name))
        return total


def _sum_over_holders(group_name: str, totals: Tensor) -> Tensor:
    """Differentiable, for the statistics of a batch norm."""
    summed: Tensor = SumOverGroup.apply(totals, groups._get_expert_data_parallel_group(group_name))
    return summed


class SpreadPlaced(PlacedExperts, MoE):
    """The experts of this process. DeepSpeed's engine takes it for a `MoE` of its own.

    Args:
        layer: the whole container, identical on every process.
        ep_size: processes that share the experts; divides their number.

    Attributes:
        shapes: "expert.tensor" -> its own shape, of all experts and not only those held here.
    """

    def __init__(self, layer: PlacedExperts, *, ep_size: int) -> None:
        # no base class is initialised: one would take the experts, the other build its own
        nn.Module.__init__(self)
        groups._create_expert_and_data_parallel(ep_size)
        self.ep_size, self.expert_group_name = ep_size, f"ep_size_{ep_size}"
        self.names, self.num_experts = layer.names, len(layer.names)
        self.num_local_experts = self.num_experts // ep_size
        self.placement = SpreadPlacement(self.expert_group_name)
        self.shapes = {name: entry.shape for name, entry in layer.experts.state_dict().items()}
        first = self.group_rank * self.num_local_experts
        held = self.names[first : first + self.num_local_experts]
        self.experts = nn.ModuleDict({name: layer.experts[name] for name in held})
        for slot, name in enumerate(held):
            self._enlarge(self.experts[name], slot)
        for part in self.experts.modules():
            if isinstance(part, BatchNorm) and dist.get_world_size() > ep_size:
                part.sum_over_ranks = partial(_sum_over_holders, self.expert_group_name)
            elif isinstance(part, BatchNorm):
                part.sum_over_ranks = None
        self.train(layer.training)

    @property
    def group_rank(self) -> int:
        """This process in its expert-parallel group."""
        return dist.get_rank(groups._get_expert_parallel_group(self.expert_group_name))

    def at_slot(self, slot: int) -> tuple[str, ...]:
        """The experts that the processes of a group hold at the same place, by process."""
        return self.names[slot :: self.num_local_experts]

    def _enlarge(self, expert: nn.Module, slot: int) -> None:
        """Give parameters the largest shape at their place, and DeepSpeed's tags."""
        for own, parameter in expert.named_parameters():
            sizes = [self.shapes[f"{name}.{own}"] for name in self.at_slot(slot)]
            largest = torch.Size(map(max, zip(*sizes, strict=True)))
            if largest != parameter.shape:
                parameter.data = enlarged(parameter.data, largest)
            tags = {"allreduce": False, "group_name": self.expert_group_name}
            vars(parameter).update(tags, single_expert=True)  # what DeepSpeed reads, and we

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Called by DeepSpeed's engine; the groups exist since the container was made."""


def enlarged(tensor: Tensor, shape: torch.Size) -> Tensor:
    """A tensor with zeros behind its end in every dimension."""
    whole = tensor.new_zeros(shape)
    whole[tuple(slice(0, size) for size in tensor.shape)] = tensor
    return whole
