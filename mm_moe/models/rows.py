"""Which rows of a batch each tower gets, and what routers and prompts may know of them.

Axes: B samples, M modalities, N packed rows of one modality, G rows whose tokens are generated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mm_moe.backbones.base import Payload
from mm_moe.batch import pattern_index
from mm_moe.errors import DataError
from mm_moe.moe.context import TokenContext


def packed_rows(
    present_BM: Tensor, inputs: Mapping[str, Payload], modalities: Sequence[str]
) -> dict[str, Tensor]:
    """Positions (N,) in the batch of each modality's packed rows.

    Raises:
        DataError: a payload whose rows are not the samples that have the modality.
    """
    if present_BM.ndim != 2 or present_BM.shape[1] != len(modalities):
        raise DataError(
            f"present has shape {tuple(present_BM.shape)}, not (B, {len(modalities)}) for "
            f"the modalities {', '.join(modalities)}."
        )
    rows = {}
    for m, name in enumerate(modalities):
        rows[name] = present_BM[:, m].nonzero().squeeze(1)
        payload = inputs.get(name) or {}
        given = len(next(iter(payload.values()))) if payload else 0
        if given != len(rows[name]):
            raise DataError(
                f"the batch holds {given} rows of {name!r}, but {len(rows[name])} of its "
                f"{len(present_BM)} samples are marked as having it."
            )
    return rows


def token_contexts(
    present_BM: Tensor,
    interaction_B: Tensor | None,
    rows: Mapping[str, Tensor],
    lacking: Mapping[str, Tensor],
) -> dict[str, TokenContext]:
    """What routers may know of each modality's rows.

    The blank row of a modality without rows has everything, and interaction 0.

    Args:
        present_BM: of the batch.
        interaction_B: type of each sample's interaction, if the data know it.
        rows: modality, in the model's order -> positions (N,) of its packed rows.
        lacking: modality -> positions (G,) of the rows that are generated.

    Raises:
        DataError: interactions that are not one per sample.
    """
    if interaction_B is not None and interaction_B.shape != present_BM.shape[:1]:
        raise DataError(
            f"interaction has shape {tuple(interaction_B.shape)}; the batch has "
            f"{len(present_BM)} samples and needs one type for each, ({len(present_BM)},)."
        )
    combination_B = pattern_index(present_BM)
    if interaction_B is None and not len(present_BM):
        interaction_B = combination_B  # no sample lacks its type
    complete_1 = combination_B.new_full((1,), 2 ** len(rows) - 1)
    contexts = {}
    for m, (name, rows_N) in enumerate(rows.items()):
        interaction_N = None
        if interaction_B is not None:
            interaction_N = interaction_B[rows_N] if len(rows_N) else complete_1 * 0
            interaction_N = torch.cat([interaction_N, interaction_B[lacking[name]]])
        combination_N = combination_B[rows_N] if len(rows_N) else complete_1
        combination_N = torch.cat([combination_N, combination_B[lacking[name]]])
        contexts[name] = TokenContext(m, combination_N, interaction_N)
    return contexts


def prompt_rows(
    present_BM: Tensor, rows: Mapping[str, Tensor], lacking: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """What a prompt starts from; a modality without rows gets an extra, complete sample.

    Returns:
        Presence (B + 1, M) and modality -> positions in it.
    """
    complete_1M = present_BM.new_ones(1, present_BM.shape[1])
    extra_1 = torch.full((1,), len(present_BM), device=present_BM.device)
    places = {
        name: torch.cat([rows_N if len(rows_N) else extra_1, lacking[name]])
        for name, rows_N in rows.items()
    }
    return torch.cat([present_BM, complete_1M]), places
