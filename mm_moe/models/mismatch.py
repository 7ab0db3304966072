"""What a file of weights has that a model of its configuration has not, in words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from mm_moe.errors import CheckpointError
from mm_moe.models.folder import config_of, new_model
from mm_moe.models.shapes import shape_difference
from mm_moe.models.shards import INDEX, WEIGHTS, weight_files


def check_folder(folder: Path) -> None:
    """Compare a model folder's weights with its configuration, without reading the weights.

    Raises:
        CheckpointError: a file is unreadable, or a tensor is missing, unknown or of another shape,
            such as a stack with an expert too few or too many; names file and tensor.
    """
    file = folder / (INDEX if len(weight_files(folder)) > 1 else WEIGHTS)
    try:
        fields, _ = PreTrainedConfig.get_config_dict(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{str(folder / 'config.json')!r} cannot be read: {error}; take another checkpoint-N."
        ) from error
    with torch.device("meta"):
        model = new_model(config_of(fields))
    expected = {name: entry.shape for name, entry in model.state_dict().items()}
    found: dict[str, Sequence[int]] = {}
    for part in weight_files(folder):
        found |= _shapes(part)
    for name in expected | found:
        if name not in found:
            raise CheckpointError(
                f"{str(file)!r} has no tensor {name!r} (it holds {len(found)}, the model "
                f"{len(expected)}); take another checkpoint-N."
            )
        if name not in expected:
            raise CheckpointError(
                f"{str(file)!r} has a tensor {name!r} that its config.json does not know (it holds "
                f"{len(found)}, the model {len(expected)}); take another checkpoint-N."
            )
        if tuple(found[name]) != tuple(expected[name]):
            raise CheckpointError(
                f"{str(file)!r}: {shape_difference(name, found[name], expected[name])}"
            )


def _shapes(file: Path) -> dict[str, Sequence[int]]:
    try:
        with safe_open(str(file), framework="pt") as source:
            return {name: source.get_slice(name).get_shape() for name in source.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{str(file)!r} cannot be read: {error}; take another checkpoint-N."
        ) from error
