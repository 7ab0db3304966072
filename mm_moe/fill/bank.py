"""A bank of learned tokens by what a sample has.

Axes: B samples, M modalities, R sets of the other modalities, P tokens, H width, Q missing cells.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mm_moe.batch import pattern_index
from mm_moe.errors import ConfigError
from mm_moe.fill.base import Cells, Fill, FillShape
from mm_moe.moe.layer import RoutingRecord

MAX_MODALITIES = 8  # the bank has M * 2 ** (M - 1) entries


class BankFill(Fill):
    """Learned tokens for each modality and each set of modalities that the sample has.

    Source: Flex-MoE (Yun et al. 2024), the missing modality bank, drawn from N(0, 1). Its bank has
    a row per non-empty set and all modalities, of which those that the set has are never read; here
    a modality has a row for each set of the *other* modalities, and nothing is dead. The bank's
    routing losses belong to the sparse layers behind it: see the router `flex`.

    Raises:
        ConfigError: more modalities than a bank is made for.
    """

    def __init__(self, shape: FillShape, *, warm_up_steps: int = 0) -> None:
        super().__init__(shape, warm_up_steps=warm_up_steps)
        count = len(shape.modalities)
        if count > MAX_MODALITIES:
            raise ConfigError(
                f"fill 'bank' keeps tokens for every set of modalities and takes at most "
                f"{MAX_MODALITIES} modalities, not {count}; take fill 'default' or 'retriever'."
            )
        self.bank_MRPH = nn.Parameter(
            torch.empty(count, 2 ** (count - 1), shape.num_tokens, shape.width)
        )
        nn.init.normal_(self.bank_MRPH)

    def make(self, cells: Cells) -> tuple[Tensor, dict[str, RoutingRecord]]:
        """The bank's entry for each cell."""
        row_Q = others_index(cells.present_BM.index_select(0, cells.sample_Q), cells.modality_Q)
        return self.bank_MRPH[cells.modality_Q, row_Q], {}


def others_index(present_QM: Tensor, modality_Q: Tensor) -> Tensor:
    """Index (Q,) of the set of present modalities when bit `modality_Q`, a missing one, goes."""
    whole_Q = pattern_index(present_QM)
    low_Q = whole_Q % 2**modality_Q
    return low_Q + (whole_Q - low_Q).div(2, rounding_mode="floor")
