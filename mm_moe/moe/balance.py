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
    """Totals over the tokens of all ranks; `prob_E` and `z` carry gradients, `entropy` if asked.

    Attributes:
        prob_E: sum of router probabilities per expert.
        routed_E: number of choices per expert, before any dropping; the same on every rank.
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
        entropy_gradient: bool = False,
        sum_over_ranks: SumOverRanks = lambda totals: totals,
    ) -> RoutingSums:
        """Sum this rank's tokens, then sum over ranks in one collective.

        Zero tokens are legal: the sums are zero and stay connected to the graph.
        """
        num_tokens, num_experts = prob_TE.shape
        routed_E = torch.bincount(expert_TK.flatten(), minlength=num_experts)[:num_experts]
        routed_E = routed_E.to(prob_TE.dtype)  # id E stands for "no choice"
        z = logit_TE.logsumexp(-1).square().sum()
        # the clamp keeps the gradient of an underflowed probability finite
        tiny = torch.finfo(prob_TE.dtype).tiny
        sure_TE = prob_TE.clamp(min=tiny) if entropy_gradient else prob_TE.detach()
        entropy = torch.special.entr(sure_TE).sum()
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
            entropy=entropy,
            dropped=dropped.detach(),
            tokens=tokens.detach(),
        )

    def metrics(self) -> dict[str, Tensor]:
        """What a layer reports beside its losses, detached; see `RoutingRecord.metrics`."""
        return {
            "router_entropy": local_entropy(self).detach(),
            "router_z": router_z(self).detach(),
            "dropped": self.dropped / self.routed_E.sum().clamp(min=1),
            "tokens": self.tokens,
        }


def load_balance(sums: RoutingSums) -> Tensor:
    """Switch load-balance loss: E * sum over experts of (share of choices) * (mean probability).

    1 when the load is even, E at the worst; 0 when no rank has a token.
    Source: Fedus et al. 2022, eq. 4. With K > 1 the share is taken over all T * K choices.
    """
    share_E = sums.routed_E / sums.routed_E.sum().clamp(min=1)
    mean_E = sums.prob_E / sums.tokens.clamp(min=1)
    return sums.prob_E.shape[0] * (share_E * mean_E).sum()


def load_balance_in_groups(sums: RoutingSums, num_groups: int) -> Tensor:
    """The load-balance loss inside each group of E / G experts, weighted by the group's tokens.

    For routers that send a token to its group by what it is: how many tokens a group gets is not
    theirs to balance. 1 when the load is even inside every group; with one group, `load_balance`.
    """
    routed_GE = sums.routed_E.view(num_groups, -1)
    prob_GE = sums.prob_E.view(num_groups, -1)
    share_GE = routed_GE / routed_GE.sum(-1, keepdim=True).clamp(min=1)
    # probabilities of a group sum to its tokens, so (tokens / T) * (prob / tokens) is prob / T
    return prob_GE.shape[1] * (share_GE * prob_GE).sum() / sums.tokens.clamp(min=1)


def local_entropy(sums: RoutingSums) -> Tensor:
    """Mean entropy of the tokens' distributions over experts: low when each token is decided.

    Source: LIMoE (Mustafa et al. 2022), the local loss. A layer's call sees the tokens of one
    modality, so the loss is per modality, as theirs.
    """
    return sums.entropy / sums.tokens.clamp(min=1)


def global_entropy(sums: RoutingSums, threshold: float) -> Tensor:
    """max(0, threshold - entropy of the mean distribution): 0 when enough experts are used.

    With threshold log(S), a modality may settle on S experts without cost. 0 when no rank has a
    token. Source: LIMoE (Mustafa et al. 2022), the global loss with its threshold.
    """
    mean_E = sums.prob_E / sums.tokens.clamp(min=1)
    entropy = torch.special.entr(mean_E.clamp(min=torch.finfo(mean_E.dtype).tiny)).sum()
    return (threshold - entropy).clamp(min=0) * (sums.tokens > 0)


def router_z(sums: RoutingSums) -> Tensor:
    """Router z-loss: the mean squared log-partition value, which keeps logits small.

    Source: Zoph et al. 2022 (ST-MoE), eq. 5.
    """
    return sums.z / sums.tokens.clamp(min=1)
