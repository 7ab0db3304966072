"""Routing among the experts that belong to the modality a token shall stand for.

T tokens, E experts, M modalities, C candidates of a modality, A experts that a token may visit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mm_moe.errors import ConfigError, DataError
from mm_moe.moe.balance import RoutingSums, SumOverRanks
from mm_moe.moe.context import TokenContext
from mm_moe.moe.router import Routing
from mm_moe.moe.router_gate import NoisyGate, chances_of, gates_of
from mm_moe.moe.router_noisy import squared_variation
from mm_moe.moe.settings import MoESettings


class CandidatesRouter(NoisyGate):
    """A token for modality m visits experts m * C to (m + 1) * C - 1 and the shared last ones.

    E = M * C + `num_shared_candidates`. Losses, each times `load_balance_coef`: the variation of
    importance and (while training) of load over the experts that a modality may visit, averaged
    over the modalities that have tokens.

    Source: MoE-Retriever. Its released loss counts load also on experts that a token may not visit,
    and was not a part of the objective.

    Raises:
        ConfigError: M is not known, or E and K do not fit it.
    """

    def __init__(self, *, width: int, settings: MoESettings) -> None:
        self.num_modalities = settings.num_modalities
        self.num_own = _num_own(settings)
        super().__init__(width=width, settings=settings)

    def group_of(self, context: TokenContext, num_tokens: int, device: torch.device) -> Tensor:
        """The target of each token's row, or the modality of the whole call.

        Raises:
            DataError: the context says neither.
        """
        target_T = context.target_T
        if target_T is not None:
            return target_T
        if context.modality is None:
            raise DataError(
                f"router {self.settings.router!r} was not told the modality that the tokens shall "
                "stand for; pass the layer a TokenContext(target=...) or (modality=...)."
            )
        return torch.full((num_tokens,), context.modality, device=device)

    def allowed(self, group_T: Tensor) -> Tensor:
        """Bool (T, E)."""
        expert_E = torch.arange(self.settings.num_experts, device=group_T.device)
        owner_E = expert_E.div(self.num_own, rounding_mode="floor")
        shared_E = expert_E >= self.num_modalities * self.num_own
        return (owner_E == group_T[:, None]) | shared_E

    def candidates(self) -> Tensor:
        """Experts (M, A) that the tokens of each modality may visit."""
        own_M1 = torch.arange(self.num_modalities)[:, None] * self.num_own
        own_MC = own_M1 + torch.arange(self.num_own)
        shared_S = torch.arange(self.num_modalities * self.num_own, self.settings.num_experts)
        return torch.cat([own_MC, shared_S.expand(self.num_modalities, -1)], 1)

    def losses(
        self, routing: Routing, sums: RoutingSums, sum_over_ranks: SumOverRanks
    ) -> dict[str, Tensor]:
        """Importance, load (while training) and z over the tokens of all ranks."""
        assert routing.group_T is not None  # set by `forward`
        coef = self.settings.of_modality(routing.modality).load_balance_coef
        member_TM = torch.nn.functional.one_hot(routing.group_T, self.num_modalities)
        member_TM = member_TM.to(routing.weight_TK.dtype)
        parts = {"importance": gates_of(routing)}
        if routing.deviation_TE is not None:
            parts["load"] = chances_of(routing)
        totals = [member_TM.t() @ part_TE for part_TE in parts.values()]
        count_M = member_TM.sum(0)
        summed = sum_over_ranks(torch.cat([*totals, count_M[:, None]], 1))
        used_M = (summed[:, -1] > 0).detach()
        losses = self.shared_losses(sums, routing.modality)
        place_MA = self.candidates().to(used_M.device)
        for i, name in enumerate(parts):
            total_ME = summed[:, i * sums.prob_E.numel() : (i + 1) * sums.prob_E.numel()]
            total_MA = total_ME.gather(1, place_MA)
            each_M = torch.stack([squared_variation(total_A) for total_A in total_MA])
            losses[name] = coef * (each_M * used_M).sum() / used_M.sum().clamp(min=1)
        return losses


def _num_own(settings: MoESettings) -> int:
    count, shared = settings.num_modalities, settings.num_shared_candidates
    if count < 1:
        raise ConfigError(
            f"router {settings.router!r} needs to know the number of modalities; outside a model "
            "set moe.num_modalities."
        )
    own, rest = divmod(settings.num_experts - shared, count)
    if rest or own < 1:
        raise ConfigError(
            f"moe.num_experts ({settings.num_experts}) must be the {shared} shared candidates and "
            f"as many for each of the {count} modalities; try num_experts="
            f"{max(1, own) * count + shared}."
        )
    if settings.top_k > own + shared:
        raise ConfigError(
            f"moe.top_k ({settings.top_k}) is more than the {own + shared} experts that a token "
            f"may visit ({own} of its modality and {shared} shared); try top_k={own + shared}."
        )
    return own
