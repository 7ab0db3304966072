"""Low-rank adapters (LoRA) on a backbone's linear layers, by `peft`.

The dense weights stay as they are and are frozen; each chosen layer gets `B A x * alpha / r` beside
it, with B zero at first, so that the model starts as it was. Source: Hu et al. 2021.

Adapters keep their own names in every checkpoint and published folder, which therefore resumes and
can be trained on; it needs `peft` to load, and nothing of the training program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from mm_moe.backbones.base import Backbone, Tower
from mm_moe.errors import ConfigError
from mm_moe.moe.layer import moe_layers
from mm_moe.registry import nearest

MARK = ".lora_"  # what peft puts into the name of every adapter weight


@dataclass(frozen=True)
class LoraSettings:
    """Shape and place of the adapters.

    Attributes:
        r: rank.
        alpha: the update is scaled by alpha / r.
        dropout: of the adapters' input in training.
        target: last parts of the names of linear layers, such as "q_proj"; None means the attention
            projections of every block.
    """

    r: int
    alpha: float = 16.0
    dropout: float = 0.0
    target: list[str] | None = None

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError(f"lora.r ({self.r}) must be at least 1; leave lora out for none.")
        if not self.alpha > 0:
            raise ConfigError(f"lora.alpha ({self.alpha}) must be positive.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout ({self.dropout}) must lie in [0, 1).")
        if self.target is not None and not self.target:
            raise ConfigError("lora.target is empty; leave it out for the attention projections.")

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> LoraSettings:
        """Settings from a dict; ConfigError for a field that does not exist."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise ConfigError(f"unknown lora option {name!r}; {nearest(name, known)}")
        return cls(**fields)

    def asdict(self) -> dict[str, Any]:
        """The fields as JSON-able values."""
        return dataclasses.asdict(self)


def add_lora(backbone: Backbone, settings: LoraSettings) -> list[str]:
    """Put adapters on a backbone in place, and freeze every other weight of its towers.

    Sparse layers, and what a backbone has besides its towers, stay as trainable as they were.

    Returns:
        The names of the layers that have an adapter now.

    Raises:
        ConfigError: a target that matches no linear layer, or a backbone without attention.
    """
    from peft import LoraConfig, inject_adapter_in_model  # slow to import

    for tower in backbone.towers.values():
        tower.prepare_adapters()  # type: ignore[operator]  # a Tower
    targets = lora_targets(backbone, settings.target)
    in_towers = {id(p) for p in backbone.towers.parameters()}
    sparse = {id(p) for layer in moe_layers(backbone).values() for p in layer.parameters()}
    kept = [p for p in backbone.parameters() if p.requires_grad]
    kept = [p for p in kept if id(p) in sparse or id(p) not in in_towers]
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # a float works and means the same
        lora_dropout=settings.dropout,
        target_modules=targets,
    )
    inject_adapter_in_model(config, backbone)
    for parameter in kept:
        parameter.requires_grad_(True)
    return targets


def merge_lora(backbone: Backbone) -> None:
    """Add every adapter's product to its layer's weight and take the adapter away."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(backbone.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, attribute = name.rpartition(".")
            setattr(backbone.get_submodule(parent), attribute, module.get_base_layer())
    vars(backbone).pop("peft_config", None)  # else peft takes the next adapters for second ones
    for tower in backbone.towers.values():
        tower.undo_adapters()  # type: ignore[operator]  # a Tower


def lora_targets(backbone: Backbone, wanted: list[str] | None) -> list[str]:
    """Names of the linear layers that get an adapter.

    Raises:
        ConfigError: a name that matches nothing, or no name and no attention projections.
    """
    layers = list(_linear_layers(backbone))
    if wanted is None:
        found = [name for name in _attention_projections(backbone) if name in layers]
        if not found:
            raise ConfigError(
                "this backbone has no blocks with attention to put LoRA on; name linear layers "
                "with --lora_target, or leave --lora_r at 0."
            )
        return found
    chosen: list[str] = []
    for ending in wanted:
        matching = [name for name in layers if f".{name}".endswith(f".{ending}")]
        if not matching:
            known = sorted({name.rpartition(".")[2] for name in layers} - {ending})
            raise ConfigError(
                f"--lora_target {ending!r} is no dense linear layer of the backbone; "
                f"{nearest(ending, known)}"
            )
        chosen += matching
    return sorted(set(chosen))


def _linear_layers(backbone: Backbone) -> Iterator[str]:
    """Linear layers of the towers whose `forward` is what computes.

    Not those of a sparse layer, whose experts train already, nor the output layer of torch's own
    attention module, which reads the weight past an adapter.
    """
    closed = [f"{name}." for name in moe_layers(backbone)]
    closed += [
        f"{name}." for name, m in backbone.named_modules() if isinstance(m, nn.MultiheadAttention)
    ]
    for name, module in backbone.named_modules():
        inside = name.startswith("towers.") and not name.startswith(tuple(closed))
        if isinstance(module, nn.Linear) and inside:
            yield name


def _attention_projections(backbone: Backbone) -> list[str]:
    """The linear layers of every block that are not part of its feed-forward."""
    names = {id(module): name for name, module in backbone.named_modules()}
    found = []
    for tower in backbone.towers.values():
        assert isinstance(tower, Tower)
        for block, attribute in tower.feed_forwards():
            dense = {id(module) for module in getattr(block, attribute).modules()}
            found += [
                names[id(module)]
                for module in block.modules()
                if isinstance(module, nn.Linear) and id(module) not in dense
            ]
    return list(dict.fromkeys(found))  # a tower may serve several modalities
