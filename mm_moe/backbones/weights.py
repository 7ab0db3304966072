"""Dense weights of a backbone as one safetensors file, to ship or to start a run from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mm_moe.errors import CheckpointError


def save_weights(backbone: nn.Module, path: Path, *, dtype: torch.dtype = torch.float16) -> None:
    """Write a dense backbone's weights; float16 by default, for half the size."""
    state = {k: v.detach().to("cpu", dtype).contiguous() for k, v in backbone.state_dict().items()}
    save_file(state, str(path), metadata={"format": "pt"})


def load_weights(
    backbone: nn.Module, path: Path, *, names: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Fill a dense backbone from a file of `save_weights`, in the backbone's own precision.

    Weights of whole towers that this backbone was built without are passed over.

    Args:
        backbone: what to fill.
        path: the file.
        names: tower in the file -> its name here, where it differs ("image" -> "image_0").

    Raises:
        CheckpointError: no such file, a damaged one, or names or shapes that do not fit.
    """
    if not path.is_file():
        raise CheckpointError(f"no pretrained weights at {str(path)!r}; give another --pretrained.")
    try:
        state = load_file(str(path))
    except SafetensorError as error:
        raise CheckpointError(
            f"{str(path)!r} is not a readable safetensors file: {error}"
        ) from error
    wanted = backbone.state_dict()
    state = {_renamed(name, names): tensor for name, tensor in state.items()}
    towers = {_tower(name) for name in wanted}
    state = {k: v for k, v in state.items() if _tower(k) in towers or not k.startswith("towers.")}
    if problems := _differences(state, wanted):
        raise CheckpointError(
            f"{str(path)!r} does not fit this backbone ({len(problems)} differences in "
            f"{len(wanted)} tensors; the first: {problems[0]}); use the settings that the weights "
            "were made with."
        )
    backbone.load_state_dict(state)


def _renamed(name: str, names: Mapping[str, str]) -> str:
    first, *rest = name.split(".")
    if first == "towers" and rest[0] in names:
        return ".".join([first, names[rest[0]], *rest[1:]])
    return name


def _tower(name: str) -> str:
    return ".".join(name.split(".")[:2])


def _differences(state: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    return [
        *(f"{k} is missing" for k in wanted if k not in state),
        *(f"{k} is unknown" for k in state if k not in wanted),
        *(
            f"{k} has shape {tuple(state[k].shape)}, the model {tuple(wanted[k].shape)}"
            for k in wanted
            if k in state and state[k].shape != wanted[k].shape
        ),
    ]
