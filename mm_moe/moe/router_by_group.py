"""Hard routing: what a token is decides which group of experts it goes to.

T tokens, D width, E experts, G groups, K choices per token.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from mm_moe.errors import ConfigError, DataError
from mm_moe.moe.balance import RoutingSums, SumOverRanks, load_balance_in_groups
from mm_moe.moe.context import TokenContext
from mm_moe.moe.router import Router, Routing, choose, renormalised
from mm_moe.moe.settings import MoESettings


class GroupRouter(Router):
    """Experts in G groups of equal size: group g has the experts g * E / G to (g + 1) * E / G - 1.

    A token goes to its group. With one expert per group that is all, and the router has no
    parameter and no loss; with more, a learned softmax inside the group chooses K of them.

    Subclasses say how many groups there are and which one a token belongs to.

    Attributes:
        groups_are: what a group stands for, in the plural.

    Raises:
        ConfigError: E is no multiple of G, a group has fewer than K experts, or G is unknown.
    """

    groups_are: ClassVar[str]

    def __init__(self, *, width: int, settings: MoESettings) -> None:
        self.num_groups = self.count_groups(settings)
        self.group_size = _group_size(settings, self.num_groups, self.groups_are)
        num_scores = None if self.group_size > 1 else 0
        super().__init__(width=width, settings=settings, num_scores=num_scores)

    @staticmethod
    @abstractmethod
    def count_groups(settings: MoESettings) -> int:
        """G; 0 where the settings do not say."""

    @abstractmethod
    def group_of(self, context: TokenContext, num_tokens: int, device: torch.device) -> Tensor:
        """Group (T,) int64 of each token, or DataError if the context does not say."""

    def forward(
        self, x_TD: Tensor, context: TokenContext | None = None, noise: Tensor | None = None
    ) -> Routing:
        """Route each token inside its group; noise plays no part.

        Raises:
            DataError: the context does not say the groups, or says one that does not exist.
        """
        group_T = self.group_of(context or TokenContext(), len(x_TD), x_TD.device)
        self.check(group_T)
        group_E = torch.arange(self.settings.num_experts, device=x_TD.device)
        group_E = group_E.div(self.group_size, rounding_mode="floor")
        if self.group_size > 1:
            logit_TE = self.score(x_TD)
        else:
            dtype = torch.promote_types(x_TD.dtype, torch.float32)
            logit_TE = torch.zeros(len(x_TD), len(group_E), dtype=dtype, device=x_TD.device)
        logit_TE = logit_TE.masked_fill(group_T.unsqueeze(1) != group_E, -torch.inf)
        prob_TE = logit_TE.softmax(-1)
        expert_TK = choose(logit_TE.detach(), self.settings.top_k)
        weight_TK = renormalised(prob_TE.gather(-1, expert_TK))
        return Routing(logit_TE, prob_TE, expert_TK, weight_TK)

    def check(self, group_T: Tensor) -> None:
        """Refuse a group that does not exist. It looks at values, so a planned pass leaves it out.

        Raises:
            DataError: says which groups there are.
        """
        if len(group_T) and not 0 <= int(group_T.min()) <= int(group_T.max()) < self.num_groups:
            raise DataError(
                f"router {self.settings.router!r} tells {self.num_groups} {self.groups_are} apart "
                f"(groups 0 to {self.num_groups - 1}), the tokens ask for groups "
                f"{int(group_T.min())} to {int(group_T.max())}; give values in that range."
            )

    def losses(
        self, routing: Routing, sums: RoutingSums, sum_over_ranks: SumOverRanks
    ) -> dict[str, Tensor]:
        """Balance inside the groups, and the shared losses; none where nothing is learnt."""
        if self.group_size == 1:
            return {}
        balance = load_balance_in_groups(sums, self.num_groups)
        return {
            "load_balance": self.settings.of_modality(routing.modality).load_balance_coef * balance,
            **self.shared_losses(sums, routing.modality),
        }


def _group_size(settings: MoESettings, num_groups: int, groups_are: str) -> int:
    num_experts, top_k = settings.num_experts, settings.top_k
    if num_groups < 1:
        raise ConfigError(
            f"router {settings.router!r} needs to know the number of {groups_are}; outside a model "
            "set moe.num_modalities."
        )
    if num_experts % num_groups:
        fit = max(1, round(num_experts / num_groups)) * num_groups
        raise ConfigError(
            f"moe.num_experts ({num_experts}) must be a multiple of the {num_groups} {groups_are} "
            f"that router {settings.router!r} tells apart; try num_experts={fit}."
        )
    size = num_experts // num_groups
    if top_k > size:
        raise ConfigError(
            f"moe.top_k ({top_k}) is more than the {size} experts that router "
            f"{settings.router!r} has for each of the {num_groups} {groups_are} (num_experts "
            f"{num_experts}); try top_k={size} or num_experts={top_k * num_groups}."
        )
    return size
