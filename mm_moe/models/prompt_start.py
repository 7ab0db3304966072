"""A new prompt, and what it may start from: its towers' own vectors, and the task's first tokens.

Axes: T tokens, N rows, L tokens of a row, D a tower's width.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from mm_moe.backbones.base import Backbone, Tower, check_options
from mm_moe.errors import ConfigError
from mm_moe.models.configuration import MultimodalMoEConfig
from mm_moe.registry import PROMPTS
from prompts.base import Prompt

SHAPES = ("widths", "num_blocks", "modalities", "source_widths")  # what a prompt gets from towers


def new_prompt(config: MultimodalMoEConfig, towers: Mapping[str, Tower]) -> Prompt:
    """The prompt that a configuration asks for, in the shapes of the towers.

    Raises:
        ConfigError: options that the prompt does not have or of a wrong type, or a tower without
            blocks.
    """
    prompt_class = PROMPTS.resolve(config.prompt)
    options = dict(config.prompt_config)
    for name, tower in towers.items():
        if config.prompt != "none" and not (tower.num_blocks and tower.attends):
            raise ConfigError(
                f"the {name} tower has no blocks that a prompt could act in; take prompt "
                "'none', or a tower with blocks of attention (timm: new_blocks)."
            )
    parameters = inspect.signature(prompt_class).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        known = [name for name in parameters if name not in SHAPES]
        check_options(config.prompt, options, known)
    if "source_widths" in parameters:
        options["source_widths"] = {name: tower.source_width for name, tower in towers.items()}
    shapes = {
        "widths": {name: tower.width for name, tower in towers.items()},
        "num_blocks": {name: tower.num_blocks for name, tower in towers.items()},
        "modalities": tuple(towers),
    }
    for name, value in config.prompt_config.items():
        if name in SHAPES or (isinstance(value, float) and not math.isfinite(value)):
            raise ConfigError(
                f"--prompt_config: {name} ({value}) cannot be; drop it or take a finite number."
            )
    try:
        return prompt_class(**shapes, **options)
    except TypeError as error:
        raise ConfigError(
            f"--prompt_config {config.prompt_config} has a value of a wrong type for "
            f"{config.prompt!r}: {' '.join(str(error).split())}."
        ) from error


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
