"""Experts choose tokens instead of tokens choosing experts.

T tokens, E experts, K choices of the token that most experts chose, G tokens of all ranks.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from mm_moe.moe.balance import RoutingSums, SumOverRanks
from mm_moe.moe.context import TokenContext
from mm_moe.moe.router import GatherOverRanks, Router, Routing, choose


class ExpertChoiceRouter(Router):
    """Each expert takes its C = capacity_factor * top_k * G / E best tokens (rounded up).

    A token is visited by 0 to E experts and gets the sum of their outputs times its softmax
    probabilities, which are not renormalised: an upcycled layer does not start as the dense one.
    Every expert has the same load by design, so there is no balance loss.

    The choice is made over the tokens of all ranks, so it is the same for every split of a batch.
    But a token's output depends on the other tokens of the batch, in evaluation too: score with the
    batch size that you mean. `capacity_factor` holds in evaluation as well.

    Source: Zhou et al. 2022. Their capacity factor is the mean number of experts per token; ours is
    relative to top_k, as everywhere else, so that with top_k = 1 it is theirs.
    """

    takes_capacity = False
    keeps_dense_function = False
    couples_samples = True

    def forward(
        self, x_TD: Tensor, context: TokenContext | None = None, noise: Tensor | None = None
    ) -> Routing:
        """Offer each token to all experts; `agree` says who takes it."""
        logit_TE = self.score(x_TD)
        prob_TE = logit_TE.softmax(-1)
        expert_TE = choose(logit_TE.detach(), self.settings.num_experts)
        return Routing(logit_TE, prob_TE, expert_TE, prob_TE.gather(-1, expert_TE))

    def agree(self, routing: Routing, gather_over_ranks: GatherOverRanks) -> Routing:
        """Keep what the experts take of all ranks' tokens; of equal ones, the first in the batch.

        K is the largest number of experts that took a token of this rank (at least 1).
        """
        prob_TE = routing.prob_TE.detach()
        prob_GE, start = gather_over_ranks(prob_TE)
        capacity = self._capacity(len(prob_GE))
        best_CE = prob_GE.sort(dim=0, descending=True, stable=True).indices[:capacity]
        taken_GE = torch.zeros_like(prob_GE, dtype=torch.bool).scatter_(0, best_CE, True)
        taken_TE = taken_GE[start : start + len(prob_TE)]
        k = max(1, int(taken_TE.sum(-1).max())) if len(taken_TE) else 1
        expert_TK = choose(prob_TE.masked_fill(~taken_TE, -1.0), k)  # those that took it first
        keep_TK = taken_TE.gather(-1, expert_TK)
        weight_TK = routing.prob_TE.gather(-1, expert_TK) * keep_TK
        return dataclasses.replace(
            routing,
            expert_TK=expert_TK.masked_fill(~keep_TK, self.settings.num_experts),
            weight_TK=weight_TK,
            keep_TK=keep_TK,
        )

    def _capacity(self, num_tokens: int) -> int:
        settings = self.settings
        even = num_tokens * settings.top_k / settings.num_experts
        return min(num_tokens, math.ceil(even * settings.capacity_factor))

    def losses(
        self, routing: Routing, sums: RoutingSums, sum_over_ranks: SumOverRanks
    ) -> dict[str, Tensor]:
        """The shared losses; the load is even by design."""
        return self.shared_losses(sums, routing.modality)
