"""Hard routing by modality."""

from __future__ import annotations

import torch
from torch import Tensor

from mm_moe.errors import DataError
from mm_moe.moe.context import TokenContext
from mm_moe.moe.router_by_group import GroupRouter
from mm_moe.moe.settings import MoESettings


class ByModalityRouter(GroupRouter):
    """Each modality has experts of its own, in the model's order of modalities.

    In a tower that sees one modality only, the experts of the others stay idle: this router is for
    layers that several modalities share, and as the control of a comparison.
    """

    groups_are = "modalities"

    @staticmethod
    def count_groups(settings: MoESettings) -> int:
        """M."""
        return settings.num_modalities

    def group_of(self, context: TokenContext, num_tokens: int, device: torch.device) -> Tensor:
        """Of a call's one modality, or of each row's own."""
        target_T = context.target_T
        if target_T is not None:
            return target_T
        if context.modality is None:
            raise DataError(
                f"router {self.settings.router!r} was not told the tokens' modality; pass the "
                "layer a TokenContext(modality=...)."
            )
        return torch.full((num_tokens,), context.modality, device=device)
