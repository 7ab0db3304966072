"""Routing by independent scores instead of a distribution over experts."""

from __future__ import annotations

from torch import Tensor

from mm_moe.moe.context import TokenContext
from mm_moe.moe.router import Router, Routing, choose, renormalised


class TopKSigmoidRouter(Router):
    """A sigmoid score per expert, the best K chosen, their scores renormalised to sum 1.

    Source: DeepSeek-V3 (2024), without its bias for balancing: the load-balance loss works on the
    scores divided by their sum.
    """

    def forward(
        self, x_TD: Tensor, context: TokenContext | None = None, noise_TE: Tensor | None = None
    ) -> Routing:
        """Route each token by itself; context and noise play no part."""
        logit_TE = self.score(x_TD)
        score_TE = logit_TE.sigmoid()
        expert_TK = choose(logit_TE, self.settings.top_k)
        weight_TK = renormalised(score_TE.gather(-1, expert_TK))
        prob_TE = score_TE / score_TE.sum(-1, keepdim=True)
        return Routing(logit_TE, prob_TE, expert_TK, weight_TK)
