"""Tokens that a prompt generates for the modalities that samples lack.

Axes: B samples, M modalities, G rows that lack a modality.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from mm_moe.backbones.base import Backbone, Payload, Tower
from mm_moe.backbones.entrance import Generated
from prompts.base import Prompt


def generated_tokens(
    prompt: Prompt, backbone: Backbone, present_BM: Tensor, inputs: Mapping[str, Payload]
) -> dict[str, Generated]:
    """Modality -> tokens for the samples that lack it; empty if the prompt generates none.

    A modality that no sample has takes part with its blank row, as in `Backbone.encode`.
    """
    if not prompt.generates:
        return {}
    entrances = {}
    for m, name in enumerate(backbone.modalities):
        tower: Tower = backbone.towers[name]  # type: ignore[assignment]
        entrances[name] = tower.enter(inputs[name] if present_BM[:, m].any() else tower.blank())
    tokens = prompt.generate(present_BM, {name: rows.source for name, rows in entrances.items()})
    return {name: Generated(entrances[name], tokens_GPD) for name, tokens_GPD in tokens.items()}


def generated_rows(
    generated: Mapping[str, Generated], modalities: tuple[str, ...], present_BM: Tensor
) -> dict[str, Tensor]:
    """Modality -> positions (G,) of the samples for which its tokens are generated, maybe none."""
    return {
        name: (~present_BM[:, m] & (name in generated)).nonzero().squeeze(1)
        for m, name in enumerate(modalities)
    }


def check_generates(prompt: Prompt, backbone: Backbone) -> None:
    """ConfigError where the prompt generates tokens that a tower cannot take."""
    if prompt.generates:
        for name in backbone.modalities:
            tower: Tower = backbone.towers[name]  # type: ignore[assignment]
            tower.stand_in(1, 1)
