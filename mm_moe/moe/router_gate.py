"""A noisy top-k gate whose noise is learned, and its two balance losses.

T tokens, D width, E experts, K choices per token, G groups of tokens.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_moe.moe.context import TokenContext
from mm_moe.moe.noise import Noise, normal_by_place
from mm_moe.moe.router import Router, Routing, choose, renormalised
from mm_moe.moe.settings import MoESettings

LEAST_DEVIATION = 1e-2


class NoisyGate(Router):
    """Logits plus softplus-scaled noise while training; softmax over the best K noisy ones.

    Source: Shazeer et al. 2017, section 2.1 and appendix A, as MoE-Retriever and Flex-MoE use it.
    `noise_std` plays no part: the noise is learned. Where a token may visit only some experts, the
    others' logits are minus infinity, and the losses do not see them.

    Subclasses say which experts a token may visit, and what tells tokens apart in the losses.
    """

    def __init__(self, *, width: int, settings: MoESettings) -> None:
        super().__init__(width=width, settings=settings)
        self.noise_weight = nn.Parameter(torch.empty(settings.num_experts, width))
        self.reset_parameters()

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Both weights from U(-1 / sqrt(D), 1 / sqrt(D)), as a linear layer of torch."""
        for parameter in self.parameters():
            bound = 1 / math.sqrt(parameter.shape[1])
            nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def wanted_noise(self) -> Noise:
        """A standard normal value for each expert."""
        return Noise(normal_by_place, self.settings.num_experts)

    def group_of(self, context: TokenContext, num_tokens: int, device: torch.device) -> Tensor:
        """Group (T,) int64 of each token, or DataError if the context does not say."""
        raise NotImplementedError

    def allowed(self, group_T: Tensor) -> Tensor | None:
        """Which experts (T, E) bool each token may visit; None: all."""
        return None

    def forward(
        self, x_TD: Tensor, context: TokenContext | None = None, noise: Tensor | None = None
    ) -> Routing:
        """Route each token among its experts; `noise` is standard normal, None for none.

        Raises:
            DataError: the context does not say the tokens' groups.
        """
        group_T = self.group_of(context or TokenContext(), len(x_TD), x_TD.device)
        logit_TE = self.score(x_TD)
        noisy_TE, deviation_TE = logit_TE, None
        if noise is not None:
            deviation_TE = self._deviation(x_TD)
            noisy_TE = logit_TE + deviation_TE * noise.to(logit_TE.dtype)
        allowed_TE = self.allowed(group_T)
        if allowed_TE is not None:
            logit_TE = logit_TE.masked_fill(~allowed_TE, -torch.inf)
            noisy_TE = noisy_TE.masked_fill(~allowed_TE, -torch.inf)
        expert_TK = choose(noisy_TE.detach(), self.settings.top_k)
        weight_TK = renormalised(noisy_TE.softmax(-1).gather(-1, expert_TK))
        return Routing(
            logit_TE,
            logit_TE.softmax(-1),
            expert_TK,
            weight_TK,
            noisy_TE=noisy_TE,
            group_T=group_T,
            deviation_TE=deviation_TE,
        )

    def _deviation(self, x_TD: Tensor) -> Tensor:
        """Standard deviation (T, E) of the noise, float32 or better as the logits."""
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            raw_TE = F.linear(x_TD.to(dtype), self.noise_weight.to(dtype))
        return F.softplus(raw_TE) + LEAST_DEVIATION


def gates_of(routing: Routing) -> Tensor:
    """Weights (T, E) of all experts, zero where a token does not go."""
    zeros_TE = routing.weight_TK.new_zeros(routing.prob_TE.shape)
    return zeros_TE.scatter(1, routing.expert_TK, routing.weight_TK)


def chances_of(routing: Routing) -> Tensor:
    """Probability (T, E) to be chosen again if this expert's noise alone were drawn anew.

    Source: Shazeer et al. 2017, appendix A. An expert that a token may not visit has probability 0,
    and where a token may visit no more than K experts, each of them has 1.
    """
    assert routing.noisy_TE is not None  # set by `forward`, in training as the deviations
    assert routing.deviation_TE is not None
    num_chosen = routing.expert_TK.shape[1]
    allowed_TE = routing.logit_TE.detach() > -torch.inf
    chosen_TE = torch.zeros_like(allowed_TE).scatter(1, routing.expert_TK, True)
    best = choose(routing.noisy_TE.detach(), min(num_chosen + 1, allowed_TE.shape[1]))
    value_TK = routing.noisy_TE.gather(-1, best)
    last_T1, next_T1 = value_TK[:, num_chosen - 1, None], value_TK[:, -1:]
    has_next_T1 = next_T1.detach() > -torch.inf
    if num_chosen == allowed_TE.shape[1]:
        has_next_T1 = torch.zeros_like(has_next_T1)
    limit_TE = torch.where(chosen_TE, next_T1.where(has_next_T1, 0), last_T1)
    clean_TE = routing.logit_TE.where(allowed_TE, 0)  # an infinity would make the gradient NaN
    chance_TE = torch.special.ndtr((clean_TE - limit_TE) / routing.deviation_TE)
    chance_TE = chance_TE.where(has_next_T1 | ~chosen_TE, 1)
    return chance_TE * allowed_TE
