"""Hard routing by the type of interaction between a sample's modalities."""

from __future__ import annotations

import torch
from torch import Tensor

from mm_moe.errors import DataError
from mm_moe.moe.context import TokenContext
from mm_moe.moe.router_by_group import GroupRouter
from mm_moe.moe.settings import MoESettings


class ByInteractionRouter(GroupRouter):
    """Each type of interaction has experts of its own; the data say a sample's type.

    Four types unless `num_interactions` says otherwise: redundancy, uniqueness, agreement synergy,
    disagreement synergy.

    Source: Mixtures of Multimodal Interaction Experts (Yu et al. 2024), where whole models are the
    experts and a classifier mixes them; here they are experts of a layer and the type is given.
    """

    groups_are = "interaction types"

    @staticmethod
    def count_groups(settings: MoESettings) -> int:
        """`num_interactions`."""
        return settings.num_interactions

    def group_of(self, context: TokenContext, num_tokens: int, device: torch.device) -> Tensor:
        """The type of the token's sample."""
        interaction_T = context.interaction_T
        if interaction_T is None:
            raise DataError(
                f"router {self.settings.router!r} needs each sample's interaction type, and the "
                'batch has none; give the batch a key "interaction" (int64, one per sample), or '
                "take another router, such as topk_softmax."
            )
        return interaction_T
