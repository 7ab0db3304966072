"""The words for a tensor that does not fit."""

from __future__ import annotations

from collections.abc import Sequence

WAY_OUT = "Take the settings of the run that wrote it, or another checkpoint."
_EXPERTS = "experts."  # in the names of stacks of experts


def shape_difference(name: str, found: Sequence[int], expected: Sequence[int]) -> str:
    """What is wrong with a tensor's shape, with both numbers and a way out.

    A stack of experts that is right but for their number is told as that.
    """
    theirs, ours = tuple(found), tuple(expected)
    stack = _EXPERTS in name and theirs[1:] == ours[1:]
    if stack:
        text = f"tensor {name!r} holds {theirs[0]} experts, the model has {ours[0]}"
    else:
        text = f"tensor {name!r} has shape {theirs}, the model needs {ours}"
    return f"{text}. {WAY_OUT}"
