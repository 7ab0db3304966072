"""The logical state of a run: one tensor for each parameter, whatever layout holds it.

An expert parameter is the stack over all E experts, addressed by global id along dimension 0, so a
checkpoint written at one expert-parallel size is read at any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mm_moe.errors import CheckpointError
from mm_moe.models.shapes import WAY_OUT, shape_difference
from mm_moe.moe.parallel_state import LogicalTensor, logical_tensors, model_state

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "master"  # the float32 copy that ZeRO keeps of every trainable parameter


def full_weights(model: nn.Module, *, keep: bool = True, apart: bool = False) -> dict[str, Tensor]:
    """The state dict with global expert stacks, on the CPU. A collective: call it on every rank.

    Args:
        model: whole, or spread over the ranks.
        keep: return the tensors; a rank that only takes part gets an empty dict, and never holds
            more than one gathered tensor.
        apart: in memory of their own, which training does not touch.
    """
    tensors: dict[str, Tensor] = {}
    for entry in logical_tensors(model, model_state(model)):
        whole = entry.gather(entry.parts)
        if keep:
            tensors[entry.name] = _on_cpu(whole, entry.parts, apart=apart)
    return tensors


def _on_cpu(
    whole: Tensor, live: Sequence[Tensor], *, apart: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """A gathered tensor on the CPU; with `apart` a copy, unless it is one already."""
    found = whole.detach().to("cpu", dtype or whole.dtype).contiguous()
    memory = found.untyped_storage().data_ptr()
    if apart and any(memory == part.untyped_storage().data_ptr() for part in live):
        return found.clone()
    return found


def load_weights(
    model: nn.Module, read: Callable[[str], Tensor], *, file: str | Path = "the checkpoint"
) -> None:
    """Copy logical tensors into a (possibly expert-parallel) model.

    Args:
        model: the model to fill.
        read: returns the logical tensor of a name; raises KeyError when there is none.
        file: where they come from, for the error's text.

    Raises:
        CheckpointError: a tensor is absent or has another shape, such as that of too few or too
            many experts; names file and tensor and both shapes.
    """
    for entry in logical_tensors(model, model_state(model)):
        pieces = entry.split(entry.pick(_fetch(read, entry, entry.name, file=file)))
        for target, piece in zip(entry.parts, pieces, strict=True):
            target.copy_(piece)


def _fetch(
    read: Callable[[str], Tensor], entry: LogicalTensor, name: str, *, file: str | Path
) -> Tensor:
    """The tensor `name` of a checkpoint, shaped as the whole of `entry`."""
    try:
        found = read(name)
    except KeyError as error:
        reason = "" if name == entry.name else "; its parameter was frozen in the run that wrote it"
        raise CheckpointError(f"{str(file)!r} has no tensor {name!r}{reason}. {WAY_OUT}") from error
    if found.shape != entry.shape:
        raise CheckpointError(f"{str(file)!r}: {shape_difference(name, found.shape, entry.shape)}")
    return found


def trainable_tensors(model: nn.Module) -> Iterator[LogicalTensor]:
    """The logical tensors of what is trained, in the order of the model."""
    held = {name: entry for name, entry in model.named_parameters() if entry.requires_grad}
    return logical_tensors(model, held)


def _is_sharded(engine: Any) -> bool:
    """Whether ZeRO (stage 1 or 2) holds the optimizer's state in flat partitions."""
    return hasattr(engine.optimizer, "single_partition_of_fp32_groups")


def _read_state(engine: Any, parameter: Any, key: str) -> Tensor:
    """One float32 state of a parameter, as large as this rank's parameter. A collective."""
    if _is_sharded(engine):
        return parameter.get_full_hp_param(None if key == MASTER else key)
    if key == MASTER:
        return parameter
    state = engine.optimizer.state.get(parameter, {})
    return state[key] if key in state else torch.zeros_like(parameter)  # no step was taken yet


def _write_state(engine: Any, parameter: Any, key: str, value: Tensor, step: int) -> None:
    """Put one state of a parameter back."""
    value = value.to(parameter.device)
    if _is_sharded(engine):
        parameter.set_full_hp_param(value, None if key == MASTER else key)
    elif key == MASTER:
        parameter.data.copy_(value)
    else:
        state = engine.optimizer.state[parameter]
        state[key] = value.to(parameter.dtype).clone()
        state["step"] = torch.tensor(float(step))


def optimizer_tensors(
    engine: Any, *, keep: bool = True, apart: bool = False
) -> tuple[dict[str, Tensor], int]:
    """Adam moments and float32 masters by logical name, and the optimizer's step count.

    A collective over all ranks; every rank gets the full result.

    Args:
        engine: a DeepSpeed engine at ZeRO stage 0, 1 or 2 with a torch Adam-type optimizer.
        keep: return the tensors; a rank that only takes part gets an empty dict.
        apart: in memory of their own, which training does not touch.
    """
    base = engine.optimizer
    if _is_sharded(engine):
        base = base.optimizer
        if base.state:
            _link_states(engine.optimizer)
        else:  # no step was taken yet
            _create_flat_states(engine.optimizer, 0)
    tensors: dict[str, Tensor] = {}
    for entry in trainable_tensors(engine.module):
        for key in (*MOMENTS, MASTER):
            held = [_read_state(engine, part, key) for part in entry.parts]
            whole = entry.gather(held)
            if keep:
                live = () if _is_sharded(engine) else held  # ZeRO puts them together in new memory
                tensors[f"{key}/{entry.name}"] = _on_cpu(
                    whole, live, apart=apart, dtype=torch.float32
                )
    step = max((int(entry["step"]) for entry in base.state.values() if "step" in entry), default=0)
    return tensors, step


def load_optimizer(
    engine: Any,
    read: Callable[[str], Tensor],
    step: int,
    *,
    file: str | Path = "the checkpoint",
) -> None:
    """Put logical moments and masters back, at any ZeRO stage <= 2 and any layout.

    Args:
        engine: a fresh engine.
        read: returns the tensor "KIND/NAME"; raises KeyError when there is none.
        step: of the optimizer.
        file: where they come from, for the error's text.

    Raises:
        CheckpointError: a trainable parameter has no state in the checkpoint, or one of another
            shape; names file and tensor and both shapes.
    """
    if _is_sharded(engine):
        _create_flat_states(engine.optimizer, step)
    for entry in trainable_tensors(engine.module):
        for key in (*MOMENTS, MASTER):
            whole = _fetch(read, entry, f"{key}/{entry.name}", file=file)
            pieces = entry.split(entry.pick(whole))
            for part, piece in zip(entry.parts, pieces, strict=True):
                _write_state(engine, part, key, piece, step)


def _create_flat_states(zero_optimizer: Any, step: int) -> None:
    """Make the moments that ZeRO would only create at its first step, to fill them."""
    for flat in zero_optimizer.single_partition_of_fp32_groups:
        zero_optimizer.optimizer.state[flat] = {
            "step": torch.tensor(float(step)),
            **{key: torch.zeros_like(flat) for key in MOMENTS},
        }
    _link_states(zero_optimizer)


def _link_states(zero_optimizer: Any) -> None:
    """Give every parameter the view of its moments.

    DeepSpeed 0.19.8 links all groups after the first group's first step, when the moments of the
    other groups do not exist yet; so it is done again.
    """
    zero_optimizer._hp_optimizer_states_linked = False
    zero_optimizer._lazy_init_hp_params_optimizer_state()
