"""Reading a published folder: weights that are missing or do not fit are an error."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from mm_moe.errors import CheckpointError
from mm_moe.models.shapes import shape_difference


def check_loaded(
    source: str, info: Mapping[str, Any], *, optional: tuple[str, ...], may_differ: bool
) -> None:
    """Refuse what the library would only warn about.

    Args:
        source: what was read, for the text.
        info: the library's loading info.
        optional: starts of names that may be new.
        may_differ: tensors of another shape are drawn anew.

    Raises:
        CheckpointError: a tensor is missing, or has another shape.
    """
    lost = sorted(k for k in info["missing_keys"] if not k.startswith(optional))
    if lost:
        raise CheckpointError(
            f"the weights of {source!r} lack {len(lost)} tensors of the model, the first is "
            f"{lost[0]!r}; load them with their own config.json."
        )
    for name, found, expected in sorted(info["mismatched_keys"]):
        if not may_differ:
            raise CheckpointError(
                f"the weights of {source!r}: {shape_difference(name, found, expected)}"
            )


def load_whole(
    load: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """A model whose checkpoint holds all its weights, and the library's loading info.

    Args:
        load: the library's `from_pretrained`.
        args: of it.
        options: its keyword arguments; `ignore_mismatched_sizes` is not heard.

    Raises:
        CheckpointError: names the first tensor that is missing or does not fit.
    """
    asked = options | {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = load(*args, **asked)
    source = str(args[0] if args else options.get("pretrained_model_name_or_path"))
    check_loaded(source, info, optional=(), may_differ=False)
    return model, info
