"""How much samples are like training rows, by the encoded modalities that both have.

Axes: M modalities, P tokens, H width, Q missing cells, S support rows, N supports of a cell.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_moe.errors import DataError
from mm_moe.fill.base import Cells, SupportTokens


@torch.no_grad()
def nearness(cells: Cells, place_QN: Tensor, modalities: tuple[str, ...]) -> Tensor:
    """Mean cosine (Q, N) over the modalities that a cell's sample and its supports have in common.

    A support with none in common counts -1.

    Args:
        cells: with supports that come whole.
        place_QN: of the cells' supports in `support_table`.
        modalities: the model's.

    Raises:
        DataError: supports that do not say which rows they are.
    """
    value_SMD, present_SM = _others(cells, modalities)
    own_BMD = F.normalize(cells.tokens_BMPH.detach().flatten(2), dim=-1)
    own_QMD = own_BMD.index_select(0, cells.sample_Q)
    theirs_QNMD = F.normalize(value_SMD, dim=-1)[place_QN]
    shared_QNM = present_SM[place_QN] & cells.present_BM[cells.sample_Q][:, None]
    cosine_QNM = torch.einsum("qmd,qnmd->qnm", own_QMD, theirs_QNMD) * shared_QNM
    count_QN = shared_QNM.sum(-1)
    return torch.where(count_QN > 0, cosine_QNM.sum(-1) / count_QN.clamp(min=1), -1.0)


def _others(cells: Cells, modalities: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """What the rows of the support table have: tokens (S + 1, M, P * H) and presence."""
    num_values = cells.tokens_BMPH.shape[2:].numel()
    values, presents = [], []
    for support in [cells.supports[name] for name in modalities if name in cells.supports]:
        found = [_found(support, cells.supports.get(other)) for other in modalities]
        blank_SD = support.tokens_SPH.new_zeros(len(support.tokens_SPH), num_values)
        each = [blank_SD if value is None else value for value, _ in found]
        values.append(torch.stack(each, 1))
        presents.append(torch.stack([there_S for _, there_S in found], 1))
    blank = cells.tokens_BMPH.new_zeros(1, len(modalities), num_values)
    nothing = torch.zeros(1, len(modalities), dtype=torch.bool, device=blank.device)
    return torch.cat([*values, blank]), torch.cat([*presents, nothing])


def _found(support: SupportTokens, other: SupportTokens | None) -> tuple[Tensor | None, Tensor]:
    """Tokens (S, P * H) of the rows of one support in another modality, and who has them (S,)."""
    size = len(support.tokens_SPH)
    nobody_S = torch.zeros(size, dtype=torch.bool, device=support.tokens_SPH.device)
    if other is None or not len(other.tokens_SPH):
        return None, nobody_S
    if support.index_S is None or other.index_S is None:
        raise DataError(
            "this fill compares samples with training rows, and the batch's supports do not "
            "say which rows they are ('index'); hand the model the batches of a collator with "
            "supports."
        )
    same_SO = support.index_S[:, None] == other.index_S
    place_S = same_SO.long().argmax(1)
    return other.tokens_SPH.detach().flatten(1)[place_S], same_SO.any(1)
