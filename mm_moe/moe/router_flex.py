"""One gate that is a general router for complete samples and a specialised one for the others.

T tokens, E experts, M modalities.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_moe.errors import ConfigError, DataError
from mm_moe.moe.balance import RoutingSums, SumOverRanks
from mm_moe.moe.context import TokenContext
from mm_moe.moe.router import Routing
from mm_moe.moe.router_gate import NoisyGate, chances_of, gates_of
from mm_moe.moe.router_noisy import squared_variation
from mm_moe.moe.settings import MoESettings


class FlexRouter(NoisyGate):
    """Expert 0 is for complete samples, expert c for the c-th set of present modalities.

    All tokens choose softly; the losses make the difference, each times `load_balance_coef`:
    `general` is the variation of importance and load over all experts of complete samples' tokens;
    `special` is the cross-entropy that pushes the first choice of the others to their set's expert;
    `balance` is the variation of importance and load of the others' tokens over experts 1 to E - 1.

    Source: Flex-MoE (Yun et al. 2024), the G- and S-router. Sets are numbered from the complete one
    down (2^M - 1 less the pattern), theirs by size; a sample with nothing has no expert of its own
    and no part in `special`.

    Raises:
        ConfigError: M is not known, or there are fewer experts than sets.
    """

    def __init__(self, *, width: int, settings: MoESettings) -> None:
        self.num_sets = 2**settings.num_modalities - 1
        if self.num_sets < 1:
            raise ConfigError(
                f"router {settings.router!r} needs to know the number of modalities; outside a "
                "model set moe.num_modalities."
            )
        if settings.num_experts < max(2, self.num_sets):
            raise ConfigError(
                f"router {settings.router!r} has an expert for each of the {self.num_sets} sets of "
                f"{settings.num_modalities} modalities; moe.num_experts ({settings.num_experts}) "
                f"is too small, try num_experts={max(2, self.num_sets)}."
            )
        super().__init__(width=width, settings=settings)

    def group_of(self, context: TokenContext, num_tokens: int, device: torch.device) -> Tensor:
        """0 for a complete sample, c for the c-th set, 2^M - 1 for nothing.

        Raises:
            DataError: the context does not say which modalities the samples have.
        """
        combination_T = context.combination_T
        if combination_T is None:
            raise DataError(
                f"router {self.settings.router!r} was not told which modalities the samples have; "
                "pass the layer a TokenContext(combination=...)."
            )
        return self.num_sets - combination_T

    def losses(
        self, routing: Routing, sums: RoutingSums, sum_over_ranks: SumOverRanks
    ) -> dict[str, Tensor]:
        """General, special, balance and z over the tokens of all ranks."""
        assert routing.group_T is not None  # set by `forward`, as the noisy scores
        assert routing.noisy_TE is not None
        complete_T = routing.group_T == 0
        own_T = (routing.group_T > 0) & (routing.group_T < self.num_sets)
        target_T = routing.group_T.clamp(max=len(sums.prob_E) - 1)
        surprise_T = F.cross_entropy(routing.noisy_TE, target_T, reduction="none")
        parts = [gates_of(routing)]
        if routing.deviation_TE is not None:
            parts.append(chances_of(routing))
        member_T2 = torch.stack([complete_T, ~complete_T], 1).to(surprise_T.dtype)
        totals = torch.cat([member_T2.t() @ part_TE for part_TE in parts], 1)
        special = torch.stack([(surprise_T * own_T).sum(), own_T.sum().to(surprise_T.dtype)])
        summed = sum_over_ranks(torch.cat([totals.flatten(), special]))
        total_2XE = summed[:-2].view(2, len(parts), -1)
        coef = self.settings.of_modality(routing.modality).load_balance_coef
        general = torch.stack([squared_variation(total_E) for total_E in total_2XE[0]]).sum()
        balance = torch.stack([squared_variation(total_E[1:]) for total_E in total_2XE[1]]).sum()
        return {
            "general": coef * general,
            "special": coef * summed[-2] / summed[-1].detach().clamp(min=1),
            "balance": coef * balance,
            **self.shared_losses(sums, routing.modality),
        }
