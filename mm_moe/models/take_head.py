"""A head that goes on from the head of another model, class by class.

Axes: C classes of the new head.
"""

from __future__ import annotations

import torch

from mm_moe.errors import ConfigError
from mm_moe.models.modeling import MultimodalMoEModel


@torch.no_grad()
def take_head(model: MultimodalMoEModel, pretrained: str) -> None:
    """Copy the head of `pretrained` into `model`; classes are matched by their names.

    A class that the other model does not have starts from zero weights. Layers below the outputs
    are copied whole.

    Args:
        model: a new model on the other's backbone.
        pretrained: folder or Hub name of a model of this library.

    Raises:
        ConfigError: one of them has no head, no class in common, or a head of another build.
    """
    other = MultimodalMoEModel.from_pretrained(pretrained)
    ours, theirs = list(model.config.label_names or ()), list(other.config.label_names or ())
    shared = [name for name in ours if name in theirs]
    if model.head is None or other.head is None or not shared:
        raise ConfigError(
            f"--keep_head true: {pretrained!r} has the classes {', '.join(theirs) or 'none'}, "
            f"of which the data ({', '.join(ours)}) have none; leave it out."
        )
    weights, found = model.head.state_dict(), other.head.state_dict()
    if set(weights) != set(found):
        raise ConfigError(f"--keep_head true: the head of {pretrained!r} has another build.")
    for name, weight in weights.items():
        if weight.shape == found[name].shape and ours == theirs:
            weight.copy_(found[name])
        elif (len(weight), len(found[name])) == (len(ours), len(theirs)):
            _copy_classes(weight, found[name], ours, theirs)
        elif weight.shape == found[name].shape:
            weight.copy_(found[name])
        else:
            raise ConfigError(
                f"--keep_head true: head.{name} of {pretrained!r} is {tuple(found[name].shape)}, "
                f"here {tuple(weight.shape)}; leave it out."
            )


def _copy_classes(
    weight: torch.Tensor, found: torch.Tensor, ours: list[str], theirs: list[str]
) -> None:
    """Rows (C, ...) by the names of their classes."""
    for row, name in enumerate(ours):
        if name in theirs:
            weight[row] = found[theirs.index(name)]
        else:
            weight[row] = 0
