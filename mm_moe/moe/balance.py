"""Losses that keep a router healthy, computed over the tokens of every rank.

The load-balance loss is a product of two means, so the mean of per-rank losses is not the loss of
the whole batch. Each rank therefore contributes sums, the dispatcher adds them over all ranks in
one differentiable all-reduce, and the loss is computed from the totals.

T tokens, E experts, K choices per token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SumOverRanks = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class RoutingSums:
    """Totals over the tokens of all ranks; `prob_E` and `z` carry gradients.

    Attributes:
        prob_E: sum of router probabilities per expert.
        routed_E: number of choices per expert, before any dropping.
        z: sum of squared log-partition values.
        entropy: sum of the entropies of the router's distributions (nats).
        dropped: number of choices dropped for lack of capacity.
        tokens: number of tokens.
    """

    prob_E: Tensor
    routed_E: Tensor
    z: Tensor
    entropy: Tensor
    dropped: Tensor
    tokens: Tensor

    @classmethod
    def of(
        cls,
        *,
        logit_TE: Tensor,
        prob_TE: Tensor,
        expert_TK: Tensor,
        dropped: Tensor | None = None,
        sum_over_ranks: SumOverRanks = lambda totals: totals,
    ) -> RoutingSums:
        """Sum this rank's tokens, then sum over ranks in one collective.

        Zero tokens are legal: the sums are zero and stay connected to the graph.
        """
        num_tokens, num_experts = prob_TE.shape
        routed_E = torch.bincount(expert_TK.flatten(), minlength=num_experts).to(prob_TE.dtype)
        z = logit_TE.logsumexp(-1).square().sum()
        entropy = torch.special.entr(prob_TE.detach()).sum()
        dropped = prob_TE.new_zeros(()) if dropped is None else dropped.to(prob_TE.dtype)
        tokens = prob_TE.new_tensor(float(num_tokens))
        scalars = torch.stack([z, entropy, dropped, tokens])
        totals = sum_over_ranks(torch.cat([prob_TE.sum(0), routed_E, scalars]))
        prob_E, routed_E, scalars = totals.split([num_experts, num_experts, 4])
        z, entropy, dropped, tokens = scalars.unbind()
        return cls(
            prob_E=prob_E,
            routed_E=routed_E.detach(),
            z=z,
            entropy=entropy.detach(),
            dropped=dropped.detach(),
            tokens=tokens.detach(),
        )


def load_balance(sums: RoutingSums) -> Tensor:
    """Switch load-balance loss: E * sum over experts of (share of choices) * (mean probability).

    1 when the load is even, E at the worst; 0 when no rank has a token.
    Source: Fedus et al. 2022, eq. 4. With K > 1 the share is taken over all T * K choices.
    """
    share_E = sums.routed_E / sums.routed_E.sum().clamp(min=1)
    mean_E = sums.prob_E / sums.tokens.clamp(min=1)
    return sums.prob_E.shape[0] * (share_E * mean_E).sum()


def router_z(sums: RoutingSums) -> Tensor:
    """Router z-loss: the mean squared log-partition value, which keeps logits small.

    Source: Zoph et al. 2022 (ST-MoE), eq. 5.
    """
    return sums.z / sums.tokens.clamp(min=1)
