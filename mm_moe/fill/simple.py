"""Fills without a look at the sample: zeros, and learned tokens.

Axes: M modalities, P tokens, H their width, Q missing cells.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mm_moe.fill.base import Cells, Fill, FillShape
from mm_moe.moe.layer import RoutingRecord

TOKEN_STD = 0.02


class ZeroFill(Fill):
    """Tokens of zeros, which whatever comes behind sees as it sees any others."""

    def make(self, cells: Cells) -> None:
        """Nothing: missing tokens are zeros already."""
        return None


class DefaultTokens(nn.Module):
    """P learned tokens for each modality."""

    def __init__(self, shape: FillShape) -> None:
        super().__init__()
        size = (len(shape.modalities), shape.num_tokens, shape.width)
        self.tokens_MPH = nn.Parameter(torch.empty(size))
        nn.init.normal_(self.tokens_MPH, std=TOKEN_STD)

    def forward(self, modality_Q: Tensor) -> Tensor:
        """Tokens (Q, P, H)."""
        return self.tokens_MPH.index_select(0, modality_Q)


class DefaultFill(Fill):
    """Learned tokens of the modality, the same for every sample."""

    def __init__(self, shape: FillShape, *, warm_up_steps: int = 0) -> None:
        super().__init__(shape, warm_up_steps=warm_up_steps)
        self.default = DefaultTokens(shape)

    def make(self, cells: Cells) -> tuple[Tensor, dict[str, RoutingRecord]]:
        """The modality's tokens for each cell."""
        return self.default(cells.modality_Q), {}
