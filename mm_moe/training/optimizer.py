"""Parameter groups that DeepSpeed's ZeRO understands: decay x dense/expert."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from mm_moe.moe.parallel_state import dimensions_of_one, is_expert_parameter

NO_DECAY_DIMENSIONS = 1  # biases, norms, gates and other vectors are not decayed


def parameter_groups(
    model: nn.Module,
    *,
    weight_decay: float,
    learning_rate: float,
    scale: Callable[[str], float] = lambda name: 1.0,
) -> list[dict]:
    """Split the trainable parameters into named groups.

    Args:
        model: an expert-parallel or plain model.
        weight_decay: for tensors of two or more dimensions; stacked expert biases (E, D) and every
            vector or scalar are exempt, as biases are.
        learning_rate: of a parameter whose `scale` is 1.
        scale: learning-rate factor by parameter name.

    Returns:
        Groups with "params", "weight_decay", "lr" and "name"; a group of experts also has
        "moe": True and the name of its expert-parallel group, by which ZeRO picks the processes to
        reduce over. Empty
        groups are left out: ZeRO cannot flatten them.
    """
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        expert = is_expert_parameter(parameter)
        decays = dimensions_of_one(parameter) > NO_DECAY_DIMENSIONS
        key = (expert, decays, scale(name))
        if key not in groups:
            groups[key] = {
                "params": [],
                "weight_decay": weight_decay if decays else 0.0,
                "lr": learning_rate * key[2],
                "name": vars(parameter)["group_name"] if expert else f"dense-{len(groups)}",
                **({"moe": True} if expert else {}),
            }
        groups[key]["params"].append(parameter)
    return list(groups.values())
