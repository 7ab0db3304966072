"""What one micro-batch looks like to the planner, and experts that compute without its values.

Each expert gets an equal share of the rows, and the process of an expert-parallel group that is
looked at receives `imbalance` times its share.

R routed rows, D width, F hidden width, P processes of an expert-parallel group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from mm_moe.backbones.clinical_series import EventEncoder
from mm_moe.moe.dispatch import Dispatcher
from mm_moe.moe.experts import Experts
from mm_moe.moe.layer import moe_layers
from mm_moe.moe.parallel_exchange import Permute
from mm_moe.moe.router_by_group import GroupRouter


@dataclass(frozen=True)
class Workload:
    """What one micro-batch looks like and how its rows meet the experts.

    Attributes:
        text_tokens: L, padded length of a text.
        real_text_tokens: mean tokens of a text that are not padding; only these are routed.
        image_size: side of an image in pixels.
        outputs: values that the head gives per sample; 0 without a head.
        problem_type: what the labels are.
        ep_size: P.
        imbalance: rows that this process receives, relative to an even share.
        half: bf16 weights and activations.
        grouped: experts run as grouped products, which keep the activated hidden values too.
        sequences: modality -> (steps, width) of inputs that are feature sequences.
        arrays: modality -> shape of inputs that are arrays.
        keep_inputs: the float32 inputs stay beside their bf16 copy (training on the host).
        recompute_every: blocks of which one is computed again in the backward pass; 0 for none.
    """

    text_tokens: int
    real_text_tokens: float
    image_size: int
    outputs: int
    problem_type: str
    ep_size: int = 1
    imbalance: float = 1.0
    half: bool = False
    grouped: bool = False
    sequences: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    arrays: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    keep_inputs: bool = False
    recompute_every: int = 0


class Arrive(torch.autograd.Function):
    """Rows of an all-to-all: a new tensor of another length, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, rows: int) -> Tensor:
        """The rows that arrive (rows, D), of which only the size is known."""
        ctx.rows = len(x_RD)
        return x_RD.new_zeros(rows, x_RD.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """As many as were sent."""
        return grad.new_zeros(ctx.rows, grad.shape[1]), None


class _Keep(torch.autograd.Function):
    """Holds (R, F) values for the backward pass: the activated hidden rows of grouped products."""

    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, hidden: int) -> Tensor:
        ctx.save_for_backward(y_RD.new_empty(len(y_RD), hidden))
        return y_RD.view_as(y_RD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class PlannedDispatcher(Dispatcher):
    """Makes the tensors that `ExpertParallelDispatcher` makes, without its collectives.

    Args:
        load: what the process receives.
    """

    def __init__(self, load: Workload) -> None:
        self.load = load

    def compute(self, x_RD: Tensor, tokens_E: Tensor, experts: Experts) -> Tensor:
        """The path of the rows to their experts and back."""
        if self.load.ep_size == 1:
            return self._run(x_RD, experts)
        sent = len(x_RD)
        received = math.ceil(sent * self.load.imbalance)
        arrived_RD = Arrive.apply(x_RD, received)
        expert_R = torch.empty(received, dtype=torch.int64)
        order_R = torch.argsort(expert_R, stable=True)
        back_R = torch.empty_like(order_R)
        back_R[order_R] = torch.arange(received)
        y_RD = self._run(Permute.apply(arrived_RD, order_R, back_R), experts)
        return Arrive.apply(Permute.apply(y_RD, back_R, order_R), sent)

    def _run(self, x_RD: Tensor, experts: Experts) -> Tensor:
        num_experts, _, hidden = experts.w_in.shape
        base, more = divmod(len(x_RD), num_experts)
        y_RD = experts(x_RD, _Rows(base + (e < more) for e in range(num_experts)))
        return _Keep.apply(y_RD, hidden) if self.load.grouped else y_RD

    def sum_over_ranks(self, totals: Tensor) -> Tensor:
        """The totals themselves: their size is what matters."""
        return totals

    def gather_over_ranks(self, rows: Tensor) -> tuple[Tensor, int]:
        """This process' rows."""
        return rows, 0


class _Rows(list):
    """Row counts that are known: what `Experts` takes from its count tensor."""

    def tolist(self) -> list[int]:
        """As of a tensor."""
        return list(self)


def fake_weights(model: nn.Module, *, load: Workload) -> None:
    """Give a meta module weights in the mode that is on, planned dispatch, and no checks of values.

    Args:
        model: on the meta device.
        load: of the micro-batch.
    """
    dtype = torch.bfloat16 if load.half else torch.float32
    known: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, old in module._parameters.items():
            if old is not None and id(old) not in known:
                new = nn.Parameter(torch.empty(old.shape, dtype=dtype), old.requires_grad)
                known[id(old)] = new
            if old is not None:
                module._parameters[name] = known[id(old)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                kind = dtype if buffer.is_floating_point() else buffer.dtype
                module._buffers[name] = torch.empty(buffer.shape, dtype=kind)
    for module in model.modules():
        if isinstance(module, EventEncoder):
            vars(module)["check"] = lambda place_NL: None
    for layer in moe_layers(model).values():
        layer.dispatcher = PlannedDispatcher(load)
        if isinstance(layer.router, GroupRouter):
            vars(layer.router)["check"] = lambda group_T: None
