"""Top-k routing that draws its choices from the router's distribution."""

from __future__ import annotations

from torch import Tensor

from mm_moe.moe.context import TokenContext
from mm_moe.moe.noise import Noise, gumbel_by_place
from mm_moe.moe.router import Router, Routing, choose, renormalised


class RSampleTopKRouter(Router):
    """Gumbel noise on the logits to choose by, weights from the clean softmax, renormalised.

    The first choice is then a sample of the softmax, and K choices are a sample without
    replacement. Outside training the best K are chosen.

    Source: the policy "RSample" of DeepSpeed's gate, which has it for one choice (and the same
    noise for the second of two); any K is ours.
    """

    def wanted_noise(self) -> Noise:
        """A Gumbel value for each expert."""
        return Noise(gumbel_by_place, self.settings.num_experts)

    def forward(
        self, x_TD: Tensor, context: TokenContext | None = None, noise: Tensor | None = None
    ) -> Routing:
        """Route each token by itself; `noise` is standard Gumbel."""
        logit_TE = self.score(x_TD)
        prob_TE = logit_TE.softmax(-1)
        by_TE = logit_TE if noise is None else logit_TE + noise.to(logit_TE.dtype)
        expert_TK = choose(by_TE.detach(), self.settings.top_k)
        weight_TK = renormalised(prob_TE.gather(-1, expert_TK))
        return Routing(logit_TE, prob_TE, expert_TK, weight_TK)
