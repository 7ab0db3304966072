"""Routing by independent scores instead of a distribution over experts."""

from __future__ import annotations

from torch import Tensor

from mm_moe.moe.context import TokenContext
from mm_moe.moe.router import Router, Routing, choose, renormalised


class TopKSigmoidRouter(Router):
    """A sigmoid score per expert, the best K chosen, their scores renormalised to sum 1.

    With `bias_update_rate` the choice is made by score plus bias.

    Source: DeepSeek-V3 (2024). Beside its bias, the load-balance loss is there too (on the scores
    divided by their sum); set `load_balance_coef` to 0 to balance by the bias alone.
    """

    takes_bias = True

    def forward(
        self, x_TD: Tensor, context: TokenContext | None = None, noise: Tensor | None = None
    ) -> Routing:
        """Route each token by itself; context and noise play no part."""
        logit_TE = self.score(x_TD)
        score_TE = logit_TE.sigmoid()
        # without a bias by logits: scores that saturate would tie
        by_TE = self.biased(score_TE) if self.settings.bias_update_rate else logit_TE
        expert_TK = choose(by_TE.detach(), self.settings.top_k)
        weight_TK = renormalised(score_TE.gather(-1, expert_TK))
        prob_TE = score_TE / score_TE.sum(-1, keepdim=True)
        return Routing(logit_TE, prob_TE, expert_TK, weight_TK)
