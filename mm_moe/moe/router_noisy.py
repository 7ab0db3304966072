"""Noisy top-k routing with importance and load losses.

T tokens, D width, E experts, K choices per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mm_moe.moe.balance import RoutingSums, SumOverRanks
from mm_moe.moe.context import TokenContext
from mm_moe.moe.noise import Noise, normal_by_place
from mm_moe.moe.router import Router, Routing, choose, renormalised


def squared_variation(total_E: Tensor) -> Tensor:
    """Squared coefficient of variation (population): 0 when all experts have the same total."""
    mean = total_E.mean()
    # the clamp only acts when no rank has a token
    return (total_E - mean).square().mean() / mean.square().clamp(min=1e-20)


class NoisyTopKRouter(Router):
    """Softmax of logits plus N(0, (noise_std / E)^2) while training, the best K chosen.

    Losses: half `load_balance_coef` each for the variation of importance (summed noise-free
    probabilities) and of load (summed probability to be chosen again under new noise); the latter
    only where there is noise.

    Source: V-MoE (Riquelme et al. 2021), appendix A. We renormalise the weights over the choices.
    """

    def wanted_noise(self) -> Noise | None:
        """A standard normal value for each expert."""
        return Noise(normal_by_place, self.settings.num_experts) if self._std else None

    def forward(
        self, x_TD: Tensor, context: TokenContext | None = None, noise: Tensor | None = None
    ) -> Routing:
        """Route each token by itself; `noise` is standard normal, None outside training."""
        logit_TE = self.score(x_TD)
        noisy_TE = logit_TE
        if noise is not None:
            noisy_TE = logit_TE + self._std * noise.to(logit_TE.dtype)
        expert_TK = choose(noisy_TE, self.settings.top_k)
        weight_TK = renormalised(noisy_TE.softmax(-1).gather(-1, expert_TK))
        return Routing(logit_TE, logit_TE.softmax(-1), expert_TK, weight_TK, noisy_TE=noisy_TE)

    @property
    def _std(self) -> float:
        return self.settings.noise_std / self.settings.num_experts

    def losses(
        self, routing: Routing, sums: RoutingSums, sum_over_ranks: SumOverRanks
    ) -> dict[str, Tensor]:
        """Importance, load (while training) and z over the tokens of all ranks."""
        half = self.settings.of_modality(routing.modality).load_balance_coef / 2
        losses = {
            "importance": half * squared_variation(sums.prob_E),
            **self.shared_losses(sums, routing.modality),
        }
        if self.training and self._std > 0:
            losses["load"] = half * squared_variation(sum_over_ranks(self._load(routing)))
        return losses

    def _load(self, routing: Routing) -> Tensor:
        """Expected choices (E,) of each expert on this rank, if the noise were drawn again."""
        assert routing.noisy_TE is not None  # set by `forward`
        last_T1 = routing.expert_TK[:, -1:]
        threshold_T1 = routing.noisy_TE.gather(-1, last_T1)
        needed_TE = (threshold_T1 - routing.logit_TE) / self._std
        return torch.special.ndtr(-needed_TE).sum(0)
