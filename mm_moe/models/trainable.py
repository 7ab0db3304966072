"""What of a model is trained: locked towers, their last blocks, and the list that a run prints."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from mm_moe.backbones.base import Tower
from mm_moe.errors import ConfigError
from mm_moe.models.adapters import MARK
from mm_moe.moe.layer import moe_layers


def freeze_tower(tower: Tower, *, experts: bool = False, unlock_blocks: int = 0) -> None:
    """Stop the training of a tower's dense weights; routers, adapters and new parts go on.

    Args:
        tower: of one modality.
        experts: freeze the experts too.
        unlock_blocks: the last so many blocks train all their weights; what stands before and
            behind the blocks (embeddings, last norm, projection) stays frozen.

    Raises:
        ConfigError: more blocks than the tower has.
    """
    blocks = [block for block, _ in tower.feed_forwards()]
    if not 0 <= unlock_blocks <= len(blocks):
        raise ConfigError(
            f"--unlock_blocks ({unlock_blocks}) must lie in 0 to {len(blocks)}, the blocks of the "
            "locked tower."
        )
    sparse = list(moe_layers(tower).values())
    kept = {id(p) for layer in sparse for p in layer.parameters()}
    kept |= {id(p) for name, p in tower.named_parameters() if MARK in f".{name}"}
    kept |= {id(p) for part in tower.new_parts() for p in part.parameters()}
    if experts:
        kept -= {id(p) for layer in sparse for p in layer.experts.parameters()}
    for parameter in tower.parameters():
        if id(parameter) not in kept:
            parameter.requires_grad_(False)
    for block in blocks[len(blocks) - unlock_blocks :]:
        block.requires_grad_(True)


def trainable_counts(
    model: nn.Module, towers: Iterable[tuple[str, Tower]]
) -> list[tuple[str, int]]:
    """(group, number of trainable values) for each group of parameters, 0 where frozen."""
    groups: dict[str, int] = {}
    seen: dict[int, str] = {}
    for name, tower in towers:
        for layer in moe_layers(tower).values():
            seen |= {id(p): f"{name} routers" for p in layer.parameters()}
            seen |= {id(p): f"{name} experts" for p in layer.experts.parameters()}
    for path, parameter in model.named_parameters():
        group = seen.get(id(parameter)) or _group(path)
        groups.setdefault(group, 0)
        groups[group] += parameter.numel() * parameter.requires_grad
    return list(groups.items())


def _group(path: str) -> str:
    """Group of a parameter outside the sparse layers: "image tower", "text lora", "head", ..."""
    first, *rest = path.split(".")
    if first != "backbone":
        return first
    if rest[0] != "towers":
        return f"{rest[1]} {rest[0]}"
    return f"{rest[1]} lora" if MARK in path else f"{rest[1]} tower"
