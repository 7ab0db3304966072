"""A new fill in the shapes of its backbone."""

from __future__ import annotations

import inspect
from typing import Any

from mm_moe.backbones.base import Backbone, check_options
from mm_moe.errors import ConfigError
from mm_moe.fill.base import Fill, FillShape
from mm_moe.registry import FILLS

SHAPE = "shape"  # what a fill gets from the backbone


def check_fill_options(fill: str, options: dict[str, Any]) -> None:
    """Refuse options that the fill does not have.

    Raises:
        ConfigError: an unknown fill or option; the nearest ones are named.
    """
    kind = FILLS.resolve(fill)
    if not (isinstance(kind, type) and issubclass(kind, Fill)):
        raise ConfigError(f"fill {fill!r} is no subclass of mm_moe.fill.base.Fill; name one.")
    parameters = inspect.signature(kind).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        check_options(f"fill {fill!r}:", options, [name for name in parameters if name != SHAPE])


def new_fill(fill: str | None, options: dict[str, Any], backbone: Backbone) -> Fill | None:
    """The fill that a configuration asks for, or None.

    Args:
        fill: name in the registry, or `pkg.mod:Class`.
        options: its own.
        backbone: whose features are `num_tokens` tokens of one width, the same for all modalities.

    Raises:
        ConfigError: options that cannot work, or features of different widths.
    """
    if fill is None:
        return None
    check_fill_options(fill, options)
    widths = {name: backbone.feature_width(name) for name in backbone.modalities}
    first, num_tokens = next(iter(widths.values())), backbone.num_tokens
    if len(set(widths.values())) > 1 or first % num_tokens:
        listed = ", ".join(f"{name} {width}" for name, width in widths.items())
        raise ConfigError(
            f"fill {fill!r} needs a backbone that gives every modality the same {num_tokens} "
            f"token(s) of one width, and its features have the widths {listed}; take --backbone "
            "clinical, or leave out --fill."
        )
    fill_class = FILLS.resolve(fill)
    shape = FillShape(tuple(backbone.modalities), num_tokens, first // num_tokens)
    try:
        return fill_class(shape, **options)
    except TypeError as error:
        raise ConfigError(
            f"--fill_config {options} has a value of a wrong type for {fill!r}: "
            f"{' '.join(str(error).split())}."
        ) from error
