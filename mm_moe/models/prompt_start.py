"""What a prompt may start from: its towers' own vectors, and the task's first tokens.

Axes: T tokens, N rows, L tokens of a row, D a tower's width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mm_moe.backbones.base import Backbone


def anchors(backbone: Backbone) -> dict[str, Tensor]:
    """Modality -> (D,) of the towers that have an anchor; none while weights are on "meta"."""
    found: dict[str, Tensor] = {}
    for name in backbone.modalities:
        anchor_D = backbone.towers[name].anchor()  # type: ignore[operator]
        if anchor_D is not None and not anchor_D.is_meta:
            found[name] = anchor_D
    return found


def first_tokens(backbone: Backbone, batches: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Modality -> (T, D), the real tokens of all batches that enter the tower's first block."""
    tokens: dict[str, list[Tensor]] = {name: [] for name in backbone.modalities}
    for batch in batches:
        for name, payload in batch["inputs"].items():
            x_NLD, mask_NL = backbone.towers[name].embed(payload)  # type: ignore[operator]
            tokens[name].append(x_NLD.flatten(0, 1) if mask_NL is None else x_NLD[mask_NL])
    return {name: torch.cat(x) for name, x in tokens.items() if x}
