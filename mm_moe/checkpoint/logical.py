"""The logical state of a run: one tensor for each parameter, whatever layout holds it.

An expert parameter is the stack over all E experts, addressed by global id along dimension 0, so a
checkpoint written at one expert-parallel size is read at any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mm_moe.errors import CheckpointError
from mm_moe.moe.layer import MoELayer, moe_layers
from mm_moe.moe.parallel import gather_experts, is_expert_parameter, slice_experts

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "master"  # the float32 copy that ZeRO keeps of every trainable parameter


def _owner(name: str, layers: dict[str, MoELayer]) -> MoELayer:
    for prefix, layer in layers.items():
        if name.startswith(f"{prefix}."):
            return layer
    raise AssertionError(f"expert parameter {name} outside every MoE layer")


def parameters_with_owner(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, MoELayer | None]]:
    """Yield (name, parameter, its MoE layer if it is a stack of this rank's experts)."""
    layers = moe_layers(model)
    for name, parameter in model.named_parameters():
        owner = _owner(name, layers) if is_expert_parameter(parameter) else None
        yield name, parameter, owner


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with global expert stacks, on the CPU. A collective: call it on every rank."""
    state = {name: entry.detach() for name, entry in model.state_dict().items()}
    for name, parameter, owner in parameters_with_owner(model):
        if owner is not None:
            state[name] = gather_experts(parameter.detach(), owner)
    return {name: entry.cpu().contiguous() for name, entry in state.items()}


def load_weights(model: nn.Module, read: Callable[[str], Tensor]) -> None:
    """Copy logical tensors into a (possibly expert-parallel) model.

    Args:
        model: the model to fill.
        read: returns the logical tensor of a name; raises KeyError when there is none.

    Raises:
        CheckpointError: a tensor is absent or has another shape; names it.
    """
    owners = {name: owner for name, _, owner in parameters_with_owner(model)}
    for name, target in model.state_dict().items():
        try:
            source = read(name)
        except KeyError as error:
            raise CheckpointError(f"the checkpoint has no tensor {name!r}.") from error
        owner = owners.get(name)
        source = source if owner is None else slice_experts(source, owner)
        if source.shape != target.shape:
            raise CheckpointError(
                f"tensor {name!r} has shape {tuple(source.shape)} in the checkpoint and "
                f"{tuple(target.shape)} in the model; resume with the settings of that run."
            )
        with torch.no_grad():
            target.copy_(source)


def _trainable(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, MoELayer | None]]:
    return (entry for entry in parameters_with_owner(model) if entry[1].requires_grad)


def _is_sharded(engine: Any) -> bool:
    """Whether ZeRO (stage 1 or 2) holds the optimizer's state in flat partitions."""
    return hasattr(engine.optimizer, "single_partition_of_fp32_groups")


def _read_state(engine: Any, parameter: Any, key: str) -> Tensor:
    """One float32 state of a parameter, as large as this rank's parameter. A collective."""
    if _is_sharded(engine):
        return parameter.get_full_hp_param(None if key == MASTER else key)
    return parameter if key == MASTER else engine.optimizer.state[parameter][key]


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


def optimizer_tensors(engine: Any) -> tuple[dict[str, Tensor], int]:
    """Adam moments and float32 masters by logical name, and the optimizer's step count.

    A collective over all ranks; every rank gets the full result.

    Args:
        engine: a DeepSpeed engine at ZeRO stage 0, 1 or 2 with a torch Adam-type optimizer.
    """
    base = engine.optimizer
    if _is_sharded(engine):
        base = base.optimizer
        _link_states(engine.optimizer)
    tensors: dict[str, Tensor] = {}
    for name, parameter, owner in _trainable(engine.module):
        for key in (*MOMENTS, MASTER):
            value = _read_state(engine, parameter, key)
            value = value if owner is None else gather_experts(value, owner)
            tensors[f"{key}/{name}"] = value.detach().to("cpu", torch.float32).contiguous()
    step = max((int(entry["step"]) for entry in base.state.values() if "step" in entry), default=0)
    return tensors, step


def load_optimizer(engine: Any, read: Callable[[str], Tensor], step: int) -> None:
    """Put logical moments and masters back, at any ZeRO stage <= 2 and any layout.

    Raises:
        CheckpointError: a trainable parameter has no state in the checkpoint; names it.
    """
    if _is_sharded(engine):
        _create_flat_states(engine.optimizer, step)
    for name, parameter, owner in _trainable(engine.module):
        for key in (*MOMENTS, MASTER):
            try:
                value = read(f"{key}/{name}")
            except KeyError as error:
                raise CheckpointError(
                    f"the checkpoint has no optimizer state for {name!r}; it was frozen in the "
                    "run that wrote it. Resume with that run's settings."
                ) from error
            value = value if owner is None else slice_experts(value, owner)
            _write_state(engine, parameter, key, value, step)


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
