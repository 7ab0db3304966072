"""Routers decide which experts a token visits and with what weight; they move nothing.

T tokens, D width, E experts, K choices per token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_moe.moe.balance import RoutingSums, SumOverRanks, load_balance, router_z
from mm_moe.moe.context import TokenContext
from mm_moe.moe.settings import MoESettings


@dataclass(frozen=True)
class Routing:
    """What a router decided for the tokens of one rank.

    Attributes:
        logit_TE: scores before any normalisation, at least float32.
        prob_TE: the router's distribution over experts.
        expert_TK: int64, the chosen global expert ids, best first, no expert twice in a row.
        weight_TK: the weights of the chosen experts' outputs; carry the router's gradient.
        keep_TK: bool, False where a choice was dropped for lack of capacity; None keeps all.
        noisy_TE: the scores that a noisy router made the choice by; None elsewhere.
    """

    logit_TE: Tensor
    prob_TE: Tensor
    expert_TK: Tensor
    weight_TK: Tensor
    keep_TK: Tensor | None = None
    noisy_TE: Tensor | None = None


def choose(score_TE: Tensor, k: int) -> Tensor:
    """The K experts (T, K) with the highest scores; of equal scores the lower expert id wins.

    `torch.topk` leaves the order of ties open, and two ranks must never differ; `argmax` promises
    the first and is faster than a sort.
    """
    if k == 1:
        return score_TE.argmax(dim=-1, keepdim=True)
    return score_TE.sort(dim=-1, descending=True, stable=True).indices[:, :k]


def renormalised(chosen_TK: Tensor) -> Tensor:
    """Weights (T, K) that sum to 1 over the chosen experts, so that equal experts act as one.

    With one choice the value is exactly 1 while the gradient is that of log(chosen): the router
    still learns, and an upcycled model is not scaled by its router's confidence.
    """
    if chosen_TK.shape[-1] == 1:
        return chosen_TK / chosen_TK.detach()
    return chosen_TK / chosen_TK.sum(-1, keepdim=True)


class Router(nn.Module, ABC):
    """Base of routers: a linear score per expert in float32, and the losses that they share.

    A new router implements `forward` in one file and adds one line to the registry.

    Attributes:
        uses_noise: whether `forward` wants noise while training.
    """

    uses_noise: ClassVar[bool] = False

    def __init__(self, *, width: int, settings: MoESettings) -> None:
        super().__init__()
        self.settings = settings
        self.weight = nn.Parameter(torch.empty(settings.num_experts, width))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weight from N(0, 0.02^2)."""
        nn.init.normal_(self.weight, std=0.02, generator=generator)

    def score(self, x_TD: Tensor) -> Tensor:
        """Logits (T, E) in float32 (float64 stays), also under autocast or with bf16 weights.

        In bf16 many logits tie, and ties flip experts between ranks and between runs.
        """
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            return F.linear(x_TD.to(dtype), self.weight.to(dtype))

    @abstractmethod
    def forward(
        self, x_TD: Tensor, context: TokenContext | None = None, noise_TE: Tensor | None = None
    ) -> Routing:
        """Route tokens.

        Args:
            x_TD: the tokens.
            context: what is known of them besides their values.
            noise_TE: standard normal values, if `uses_noise` and training; a token's noise does not
                depend on the rank that it is on.
        """

    def losses(
        self, routing: Routing, sums: RoutingSums, sum_over_ranks: SumOverRanks
    ) -> dict[str, Tensor]:
        """Losses over the tokens of all ranks, already multiplied by their coefficients.

        `sum_over_ranks` is for a router that needs totals beyond `sums`; every rank must call it
        equally often.
        """
        return {
            "load_balance": self.settings.load_balance_coef * load_balance(sums),
            "router_z": self.settings.router_z_coef * router_z(sums),
        }


class TopKSoftmaxRouter(Router):
    """Softmax over all experts, the best K chosen, their probabilities renormalised to sum 1.

    Source: Shazeer et al. 2017, Fedus et al. 2022. We renormalise for every K (see `renormalised`);
    Switch multiplies by the raw probability, and so do we with `renormalise` False.
    """

    def forward(
        self, x_TD: Tensor, context: TokenContext | None = None, noise_TE: Tensor | None = None
    ) -> Routing:
        """Route each token by itself; context and noise play no part."""
        logit_TE = self.score(x_TD)
        prob_TE = logit_TE.softmax(-1)
        expert_TK = choose(logit_TE, self.settings.top_k)
        weight_TK = prob_TE.gather(-1, expert_TK)
        if self.settings.renormalise:
            weight_TK = renormalised(weight_TK)
        return Routing(logit_TE, prob_TE, expert_TK, weight_TK)
