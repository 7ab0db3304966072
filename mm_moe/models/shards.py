"""The weights of a model folder: one safetensors file, or several and an index that names them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from huggingface_hub.utils import SoftTemporaryDirectory
from safetensors import SafetensorError, safe_open

from mm_moe.errors import CheckpointError, ConfigError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_SIZE = "5GB"
_SIZE = re.compile(r"[1-9]\d*\s*(KB|MB|GB|TB)", re.IGNORECASE)


def has_weights(folder: Path) -> bool:
    """Whether a folder holds a model's weights, in one file or in several."""
    return (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()


def check_size(flag: str, size: str) -> str:
    """The size of a shard, as the Hugging Face libraries take it.

    Raises:
        ConfigError: not a whole number and KB, MB, GB or TB.
    """
    if not _SIZE.fullmatch(size.strip()):
        raise ConfigError(
            f"--{flag} {size!r} is no size; write a number and KB, MB, GB or TB: 5GB."
        )
    return size.strip()


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights; one file alone wins over an index, as in transformers.

    Raises:
        CheckpointError: there are none, or the index is damaged, or names a file outside the
            folder or one that is not there.
    """
    if (folder / WEIGHTS).is_file() or not (folder / INDEX).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        whole = all(isinstance(name, str) and Path(name).name == name for name in names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{str(index)!r} is no readable index of shards; take another checkpoint-N."
        ) from error
    if not names or not whole:
        raise CheckpointError(
            f"{str(index)!r} must name safetensors files of its own folder, not {names[:3]}."
        )
    for name in names:
        if not (folder / name).is_file():
            raise CheckpointError(
                f"{str(folder)!r} is incomplete: its index names {name}, which is missing; take "
                "another checkpoint-N."
            )
    return [folder / name for name in names]


def tensor_places(folder: Path) -> Mapping[str, Path]:
    """Tensor name -> the file that holds it, as the files themselves say.

    Raises:
        CheckpointError: a file is missing or is no safetensors file.
    """
    places: dict[str, Path] = {}
    for file in weight_files(folder):
        try:
            with safe_open(str(file), framework="pt") as source:
                places |= dict.fromkeys(source.keys(), file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{str(file)!r} cannot be read: {error}; take another checkpoint-N."
            ) from error
    return places


def write_shards(source: Path, target: Path, *, max_shard_size: str) -> None:
    """Write the weights of one folder into another, in files of at most this size.

    A tensor that is larger has a file of its own. The bits of the tensors stay as they are.

    Args:
        source: a model folder.
        target: an existing folder without weights.
        max_shard_size: such as "5GB".

    Raises:
        CheckpointError: the weights cannot be read.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, file in tensor_places(source).items():
        with safe_open(str(file), framework="pt") as stream:
            tensors[name] = stream.get_tensor(name)
    with SoftTemporaryDirectory(dir=target) as aside:  # a crash leaves no half set of shards
        save_torch_state_dict(
            tensors, aside, max_shard_size=max_shard_size, metadata={"format": "pt"}
        )
        for file in sorted(Path(aside).iterdir()):
            file.replace(target / file.name)
