"""Routers decide which experts a token visits and with what weight; they move nothing.

T tokens, D width, E experts, K choices per token.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_moe.errors import ConfigError
from mm_moe.moe.balance import (
    RoutingSums,
    SumOverRanks,
    global_entropy,
    load_balance,
    local_entropy,
    router_z,
)
from mm_moe.moe.context import TokenContext
from mm_moe.moe.noise import Noise
from mm_moe.moe.settings import MoESettings

GatherOverRanks = Callable[[Tensor], tuple[Tensor, int]]


class Mixing(Protocol):
    """Makes the experts' rows from tokens, and tokens from the experts' rows."""

    def to_rows(self, x_TD: Tensor) -> Tensor:
        """Rows (R, D) that the experts work on."""

    def to_tokens(self, y_RD: Tensor) -> Tensor:
        """Outputs (T, D) from the experts' outputs."""


@dataclass(frozen=True)
class Routing:
    """What a router decided for the tokens of one rank.

    Attributes:
        logit_TE: scores before any normalisation, at least float32.
        prob_TE: the router's distribution over experts.
        expert_TK: int64, the chosen global expert ids, best first, no expert twice in a row. Id E
            stands for "no choice" where a token has fewer than K; `keep_TK` is False there.
        weight_TK: the weights of the chosen experts' outputs; carry the router's gradient.
        keep_TK: bool, False where a choice was dropped for lack of capacity; None keeps all.
        noisy_TE: the scores that a noisy router made the choice by; None elsewhere.
        mixing: for a router whose experts work on mixtures: `expert_TK` and `weight_TK` are then
            about the mixtures' rows (R, 1) and no longer about tokens.
        modality: place of the tokens' modality in the model's order, which the layer fills in.
        group_T: int64, what a router's losses tell tokens apart by; None elsewhere.
        deviation_TE: standard deviation of the noise, where the router learns it.
    """

    logit_TE: Tensor
    prob_TE: Tensor
    expert_TK: Tensor
    weight_TK: Tensor
    keep_TK: Tensor | None = None
    noisy_TE: Tensor | None = None
    mixing: Mixing | None = None
    modality: int | None = None
    group_T: Tensor | None = None
    deviation_TE: Tensor | None = None


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

    Args:
        width: D.
        settings: of the layer.
        num_scores: rows of the weight; None for one per expert, 0 for no weight at all.

    Attributes:
        takes_bias: whether `bias_update_rate` works (see `biased`).
        takes_capacity: whether `drop_tokens` works.
        keeps_dense_function: whether an upcycled layer equals the dense one at initialisation: the
            weights of a token's experts sum to 1.
        couples_samples: whether a token's output depends on the tokens of other sequences.

    Raises:
        ConfigError: a setting that this router cannot honour.
    """

    takes_bias: ClassVar[bool] = False
    takes_capacity: ClassVar[bool] = True
    keeps_dense_function: ClassVar[bool] = True
    couples_samples: ClassVar[bool] = False
    bias_steps: Tensor  # only there with a bias_update_rate

    def __init__(self, *, width: int, settings: MoESettings, num_scores: int | None = None) -> None:
        super().__init__()
        self.settings = settings
        self._check_settings()
        num_scores = settings.num_experts if num_scores is None else num_scores
        if num_scores:
            self.weight = nn.Parameter(torch.empty(num_scores, width))
        if settings.bias_update_rate:
            # whole steps, not a float: casting a module to bf16 leaves integers alone
            steps_E = torch.zeros(settings.num_experts, dtype=torch.int64)
            self.register_buffer("bias_steps", steps_E)
        self.reset_parameters()

    def _check_settings(self) -> None:
        settings = self.settings
        if settings.bias_update_rate and not self.takes_bias:
            raise ConfigError(
                f"moe.bias_update_rate ({settings.bias_update_rate}) does not work with router "
                f"{settings.router!r}; set it to 0, or take topk_softmax or topk_sigmoid."
            )
        if settings.drop_tokens and not self.takes_capacity:
            raise ConfigError(
                f"moe.drop_tokens does not work with router {settings.router!r}, whose experts "
                "have a fixed number of rows by design; set drop_tokens=False."
            )

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the weight from N(0, 0.02^2)."""
        for name, parameter in self.named_parameters():
            if name == "weight":
                nn.init.normal_(parameter, std=0.02, generator=generator)

    def score(self, x_TD: Tensor) -> Tensor:
        """Logits (T, E) in float32 (float64 stays), also under autocast or with bf16 weights.

        In bf16 many logits tie, and ties flip experts between ranks and between runs.
        """
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            return F.linear(x_TD.to(dtype), self.weight.to(dtype))

    def wanted_noise(self) -> Noise | None:
        """The noise that `forward` wants while training; None for none.

        A token's noise does not depend on the rank that it is on.
        """
        return None

    @abstractmethod
    def forward(
        self, x_TD: Tensor, context: TokenContext | None = None, noise: Tensor | None = None
    ) -> Routing:
        """Route tokens.

        Args:
            x_TD: the tokens.
            context: what is known of them besides their values.
            noise: values (T, columns) of `wanted_noise`, None outside training.
        """

    def agree(self, routing: Routing, gather_over_ranks: GatherOverRanks) -> Routing:
        """What becomes of the choices when the tokens of all ranks are seen; here nothing.

        A router that needs the others' tokens overrides it; every rank must then call
        `gather_over_ranks` equally often.
        """
        return routing

    def losses(
        self, routing: Routing, sums: RoutingSums, sum_over_ranks: SumOverRanks
    ) -> dict[str, Tensor]:
        """Losses over the tokens of all ranks, already multiplied by their coefficients.

        `sum_over_ranks` is for a router that needs totals beyond `sums`; every rank must call it
        equally often.
        """
        balance = self.settings.of_modality(routing.modality).load_balance_coef
        return {
            "load_balance": balance * load_balance(sums),
            **self.shared_losses(sums, routing.modality),
        }

    def shared_losses(self, sums: RoutingSums, modality: int | None = None) -> dict[str, Tensor]:
        """The losses that make sense for every router: z, and the entropies where asked for."""
        settings = self.settings.of_modality(modality)
        losses = {"router_z": settings.router_z_coef * router_z(sums)}
        if settings.local_entropy_coef:
            losses["local_entropy"] = settings.local_entropy_coef * local_entropy(sums)
        if settings.global_entropy_coef:
            threshold = settings.global_entropy_threshold
            threshold = math.log(settings.num_experts) if threshold is None else threshold
            losses["global_entropy"] = settings.global_entropy_coef * global_entropy(
                sums, threshold
            )
        return losses

    def biased(self, score_TE: Tensor) -> Tensor:
        """Scores to choose by: with a bias per expert that has no part in the weights.

        Source: DeepSeek-V3 (2024), balancing without an auxiliary loss (Wang et al. 2024).
        """
        if not self.settings.bias_update_rate:
            return score_TE
        return score_TE + self.bias_steps.to(score_TE.dtype) * self.settings.bias_update_rate

    @torch.no_grad()
    def update_bias(self, load_E: Tensor) -> None:
        """Move each bias one step against its expert's load; call it after an optimizer step.

        Args:
            load_E: int64, choices per expert of all ranks since the last step, the same on every
                rank. An expert with exactly the mean load keeps its bias.
        """
        self.bias_steps += torch.sign(load_E.sum() - len(load_E) * load_E)


class TopKSoftmaxRouter(Router):
    """Softmax over all experts, the best K chosen, their probabilities renormalised to sum 1.

    With `bias_update_rate` the choice is made by probability plus bias.

    Source: Shazeer et al. 2017, Fedus et al. 2022. We renormalise for every K (see `renormalised`);
    Switch multiplies by the raw probability, and so do we with `renormalise` False.
    """

    takes_bias = True

    def forward(
        self, x_TD: Tensor, context: TokenContext | None = None, noise: Tensor | None = None
    ) -> Routing:
        """Route each token by itself; context and noise play no part."""
        logit_TE = self.score(x_TD)
        prob_TE = logit_TE.softmax(-1)
        # without a bias by logits: probabilities that underflow would tie
        by_TE = self.biased(prob_TE) if self.settings.bias_update_rate else logit_TE
        expert_TK = choose(by_TE.detach(), self.settings.top_k)
        weight_TK = prob_TE.gather(-1, expert_TK)
        if self.settings.renormalise:
            weight_TK = renormalised(weight_TK)
        return Routing(logit_TE, prob_TE, expert_TK, weight_TK)
