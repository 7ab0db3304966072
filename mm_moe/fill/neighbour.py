"""The tokens of the training row that is most like the sample.

Axes: M modalities, P tokens, H width, Q missing cells, S support rows, N supports of a cell.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from mm_moe.fill.base import Cells, Fill, FillShape, support_table, whole
from mm_moe.fill.similarity import nearness
from mm_moe.fill.simple import DefaultTokens
from mm_moe.moe.layer import RoutingRecord


class NeighbourFill(Fill):
    """Tokens of the nearest of the cell's supports; learned default tokens where it has none.

    Near is the mean cosine between the encoded tokens of the modalities that both have; a support
    with none in common counts -1, and of equals the first one wins. The choice has no gradient,
    the tokens that are taken have.

    Args:
        shape: of the model's tokens.
        num_supports: rows that are drawn for a cell, among which it looks; None: as many as the
            sample has modalities.
        warm_up_steps: see `Fill`.
    """

    needs_supports: ClassVar[bool] = True
    needs_whole: ClassVar[bool] = True

    def __init__(
        self, shape: FillShape, *, num_supports: int | None = None, warm_up_steps: int = 0
    ) -> None:
        super().__init__(shape, warm_up_steps=warm_up_steps)
        if num_supports is not None:
            whole("num_supports", num_supports, least=1)
        self.num_supports = num_supports
        self.default = DefaultTokens(shape)

    def make(self, cells: Cells) -> tuple[Tensor, dict[str, RoutingRecord]]:
        """Each cell's nearest support."""
        table_SPH, place_QN, _ = support_table(cells, self.shape.modalities)
        none = len(table_SPH) - 1
        near_QN = nearness(cells, place_QN, self.shape.modalities)
        near_QN = near_QN.masked_fill(place_QN == none, -torch.inf)
        best_Q = place_QN.gather(1, near_QN.argmax(1, keepdim=True)).squeeze(1)
        default_QPH = self.default(cells.modality_Q)
        found_QPH = table_SPH.index_select(0, best_Q)
        return torch.where((best_Q < none)[:, None, None], found_QPH, default_QPH), {}
