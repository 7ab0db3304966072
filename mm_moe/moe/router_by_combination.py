"""Hard routing by the set of modalities that a sample has."""

from __future__ import annotations

import torch
from torch import Tensor

from mm_moe.errors import DataError
from mm_moe.moe.context import TokenContext
from mm_moe.moe.router_by_group import GroupRouter
from mm_moe.moe.settings import MoESettings


class ByCombinationRouter(GroupRouter):
    """Each of the 2^M - 1 sets of present modalities has experts of its own.

    Group i has the samples of pattern i + 1 (bit m stands for modality m; "nothing" has no tokens).

    Source: the idea of Flex-MoE (Yun et al. 2024), an expert per combination. There a cross-entropy
    pushes a soft router's first choice to that expert; here the token goes there, always.
    """

    groups_are = "combinations of modalities"

    @staticmethod
    def count_groups(settings: MoESettings) -> int:
        """2^M - 1."""
        return 2**settings.num_modalities - 1

    def group_of(self, context: TokenContext, num_tokens: int, device: torch.device) -> Tensor:
        """The pattern of the token's sample, less one."""
        combination_T = context.combination_T
        if combination_T is None:
            raise DataError(
                f"router {self.settings.router!r} was not told which modalities the samples have; "
                "pass the layer a TokenContext(combination=...)."
            )
        return combination_T - 1
