"""The tokens of the training row that is most like the sample.

Axes: M modalities, P tokens, H width, Q missing cells, S support rows, N supports of a cell.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_moe.errors import DataError
from mm_moe.fill.base import Cells, Fill, FillShape, SupportTokens, support_table, whole
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
        near_QN = self._nearness(cells, place_QN).masked_fill(place_QN == none, -torch.inf)
        best_Q = place_QN.gather(1, near_QN.argmax(1, keepdim=True)).squeeze(1)
        default_QPH = self.default(cells.modality_Q)
        found_QPH = table_SPH.index_select(0, best_Q)
        return torch.where((best_Q < none)[:, None, None], found_QPH, default_QPH), {}

    @torch.no_grad()
    def _nearness(self, cells: Cells, place_QN: Tensor) -> Tensor:
        """Mean cosine (Q, N) over the modalities in common."""
        value_SMD, present_SM = self._others(cells)
        own_BMD = F.normalize(cells.tokens_BMPH.detach().flatten(2), dim=-1)
        own_QMD = own_BMD.index_select(0, cells.sample_Q)
        theirs_QNMD = F.normalize(value_SMD, dim=-1)[place_QN]
        shared_QNM = present_SM[place_QN] & cells.present_BM[cells.sample_Q][:, None]
        cosine_QNM = torch.einsum("qmd,qnmd->qnm", own_QMD, theirs_QNMD) * shared_QNM
        count_QN = shared_QNM.sum(-1)
        return torch.where(count_QN > 0, cosine_QNM.sum(-1) / count_QN.clamp(min=1), -1.0)

    def _others(self, cells: Cells) -> tuple[Tensor, Tensor]:
        """What the rows of the support table have: tokens (S + 1, M, P * H) and presence."""
        names = self.shape.modalities
        num_values = cells.tokens_BMPH.shape[2:].numel()
        values, presents = [], []
        for support in [cells.supports[name] for name in names if name in cells.supports]:
            found = [_found(support, cells.supports.get(other)) for other in names]
            blank_SD = support.tokens_SPH.new_zeros(len(support.tokens_SPH), num_values)
            each = [blank_SD if value is None else value for value, _ in found]
            values.append(torch.stack(each, 1))
            presents.append(torch.stack([there_S for _, there_S in found], 1))
        blank = cells.tokens_BMPH.new_zeros(1, len(names), num_values)
        nothing = torch.zeros(1, len(names), dtype=torch.bool, device=blank.device)
        return torch.cat([*values, blank]), torch.cat([*presents, nothing])


def _found(support: SupportTokens, other: SupportTokens | None) -> tuple[Tensor | None, Tensor]:
    """Tokens (S, P * H) of the rows of one support in another modality, and who has them (S,)."""
    size = len(support.tokens_SPH)
    nobody_S = torch.zeros(size, dtype=torch.bool, device=support.tokens_SPH.device)
    if other is None or not len(other.tokens_SPH):
        return None, nobody_S
    if support.index_S is None or other.index_S is None:
        raise DataError(
            "fill 'neighbour' compares samples with training rows, and the batch's supports do not "
            "say which rows they are ('index'); hand the model the batches of a collator with "
            "supports."
        )
    same_SO = support.index_S[:, None] == other.index_S
    place_S = same_SO.long().argmax(1)
    return other.tokens_SPH.detach().flatten(1)[place_S], same_SO.any(1)
