"""Dispatchers move tokens to experts and back; no padding, so a skewed load costs
no more than an even one.

Rows are sorted by expert, the experts work on contiguous slices, and each token collects the
weighted outputs of its choices. Both directions are gathers, forward and backward: nothing is added
atomically, so the result does not depend on timing.

T tokens, D width, E experts, K choices per token, R routed rows (T * K less the dropped choices).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mm_moe.moe.experts import Experts
from mm_moe.moe.router import Routing


def _collect(y_RD: Tensor, position_TK: Tensor, weight_TK: Tensor | None) -> Tensor:
    """Sum over k of weight[t, k] * y[position[t, k]]; a position of -1 (dropped) adds nothing."""
    num_tokens, k = position_TK.shape
    if not len(y_RD):
        return y_RD.new_zeros(num_tokens, y_RD.shape[1])
    all_kept = len(y_RD) == position_TK.numel()
    weights = [None] * k if weight_TK is None else weight_TK.to(y_RD.dtype).unbind(1)
    total_TD = None
    for position_T, weight_T in zip(position_TK.unbind(1), weights, strict=True):
        y_TD = y_RD.index_select(0, position_T if all_kept else position_T.clamp(min=0))
        if not all_kept:
            y_TD.mul_((position_T >= 0).unsqueeze(1))
        if weight_T is not None:
            y_TD.mul_(weight_T.unsqueeze(1))
        total_TD = y_TD if total_TD is None else total_TD.add_(y_TD)
    assert total_TD is not None  # k >= 1
    return total_TD


class _Gather(torch.autograd.Function):
    """Rows (R, D) of tokens in the order of the experts; backward sums each token's rows."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_R: Tensor, position_TK: Tensor) -> Tensor:
        ctx.save_for_backward(position_TK)
        return x_TD.index_select(0, token_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None, None]:
        (position_TK,) = ctx.saved_tensors
        return _collect(grad_RD, position_TK, None), None, None


class _Combine(torch.autograd.Function):
    """Weighted sum (T, D) of each token's expert outputs."""

    @staticmethod
    def forward(
        ctx: Any, y_RD: Tensor, weight_TK: Tensor, route_R: Tensor, position_TK: Tensor
    ) -> Tensor:
        ctx.save_for_backward(y_RD, weight_TK, route_R)
        return _collect(y_RD, position_TK, weight_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None, None]:
        y_RD, weight_TK, route_R = ctx.saved_tensors
        k = weight_TK.shape[1]
        grad_RD = grad_TD.index_select(0, route_R.div(k, rounding_mode="floor"))
        dot_R = (grad_RD * y_RD).sum(-1).to(weight_TK.dtype)
        grad_weight = weight_TK.new_zeros(weight_TK.numel()).index_copy_(0, route_R, dot_R)
        scale_R = weight_TK.flatten().index_select(0, route_R).to(grad_RD.dtype)
        return grad_RD.mul_(scale_R.unsqueeze(1)), grad_weight.view_as(weight_TK), None, None


class Dispatcher(ABC):
    """Moves tokens to experts and back. Subclasses say where the experts are.

    Not a module: it holds no weights and leaves no trace in a checkpoint.
    """

    def __call__(self, x_TD: Tensor, routing: Routing, experts: Experts) -> tuple[Tensor, Tensor]:
        """Outputs (T, D), and how many rows (E,) int64 this process sent to each global expert.

        Zero tokens are legal; the collectives (if any) are the same for every number of tokens.
        """
        num_experts, k = routing.prob_TE.shape[1], routing.expert_TK.shape[1]
        expert_R = routing.expert_TK.flatten()
        if routing.keep_TK is not None:  # dropped choices sort behind every expert
            expert_R = torch.where(routing.keep_TK.flatten(), expert_R, num_experts)
        tokens_E = torch.bincount(expert_R, minlength=num_experts + 1)[:num_experts]
        route_R = torch.argsort(expert_R, stable=True)
        if routing.keep_TK is not None:
            route_R = route_R[: int(tokens_E.sum())]
        position_TK = expert_R.new_full(expert_R.shape, -1)
        position_TK[route_R] = torch.arange(len(route_R), device=route_R.device)
        position_TK = position_TK.view_as(routing.expert_TK)
        token_R = route_R.div(k, rounding_mode="floor")
        x_RD = _Gather.apply(x_TD, token_R, position_TK)
        y_RD = self.compute(x_RD, tokens_E, experts)
        return _Combine.apply(y_RD, routing.weight_TK, route_R, position_TK), tokens_E

    @abstractmethod
    def compute(self, x_RD: Tensor, tokens_E: Tensor, experts: Experts) -> Tensor:
        """Outputs (R, D) of rows sorted by global expert, in the same order."""

    @abstractmethod
    def sum_over_ranks(self, totals: Tensor) -> Tensor:
        """Differentiable sum of a tensor over the processes that share the batch."""

    @abstractmethod
    def gather_over_ranks(self, rows: Tensor) -> tuple[Tensor, int]:
        """The rows of all processes in the order of ranks, and where this process' rows start.

        Not differentiable; processes may have different numbers of rows, also none.
        """


class LocalDispatcher(Dispatcher):
    """All experts are in this process."""

    def compute(self, x_RD: Tensor, tokens_E: Tensor, experts: Experts) -> Tensor:
        """Run the experts where the rows are."""
        return experts(x_RD, tokens_E)

    def sum_over_ranks(self, totals: Tensor) -> Tensor:
        """One process: the sum is the tensor itself."""
        return totals

    def gather_over_ranks(self, rows: Tensor) -> tuple[Tensor, int]:
        """One process: its rows are all there are."""
        return rows, 0
