"""The flags of the expert layers: one value for what can be said in several ways, and the layout.

Like `launch.checks`, all of it before any process group, folder or model exists.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
from typing import Any

from launch.checks import typed_flags
from launch.cli import read_recipe
from launch.model_config import moe_settings
from mm_moe.arguments import FLAG_OF_SETTING, parse_json
from mm_moe.errors import ConfigError, ParallelismError
from mm_moe.models.configuration import MOE_MODES, expert_settings
from mm_moe.moe.parallel import BACKENDS, check_layout, default_ep_size
from mm_moe.moe.parallel_stock import check_stock, stock_warning
from mm_moe.moe.settings import MoESettings
from mm_moe.registry import nearest
from mm_moe.training import runtime

logger = logging.getLogger("mm_moe")
PLACES = ("moe_mode", "moe_every", "moe_layers_idx")  # three ways to choose the sparse blocks


def settle_moe(values: argparse.Namespace, argv: list[str]) -> None:
    """Make the flags say what `--moe_config` says too, and refuse what no layer can be.

    Raises:
        ConfigError: two flags, or a flag and `--moe_config`, contradict each other; an unknown
            mode; settings that cannot work.
    """
    if not values.moe_enable:
        return
    typed = typed_flags(argv)
    _settle_config(values, given=typed | set(read_recipe(values.config)))
    _settle_places(values, typed=typed)
    _check_numbers(values)
    expert_settings(moe_settings(values) or {})


def _settle_config(values: argparse.Namespace, *, given: set[str]) -> None:
    """Copy what `--moe_config` sets into the flags of the same meaning."""
    options = parse_json("moe_config", values.moe_config)
    _check_types(options)
    for setting, flag in FLAG_OF_SETTING.items():
        if setting not in options:
            continue
        wanted, own = options[setting], getattr(values, flag)
        if isinstance(own, list) and not isinstance(wanted, list):
            wanted = [wanted]
        if flag in given and own != wanted:
            raise ConfigError(
                f"--{flag} {_words(own)} and {setting} {_words(wanted)} in --moe_config differ; "
                "drop one."
            )
        setattr(values, flag, wanted)


def _check_types(options: dict[str, Any]) -> None:
    """Refuse words where `--moe_config` needs numbers; unknown keys are told apart elsewhere."""
    for field in dataclasses.fields(MoESettings):
        if field.name not in options:
            continue
        value = options[field.name]
        if value is None and field.default is None:
            continue
        if field.name == "by_modality":
            if not isinstance(value, dict):
                raise ConfigError(
                    f"by_modality ({value!r}) in --moe_config must be an object: modality -> "
                    "settings of its losses."
                )
            continue
        kind = float if field.default is None else type(field.default)
        each = value if field.name == "num_experts" and isinstance(value, list) else [value]
        fits = (int, float) if kind is float else kind
        if not all(isinstance(v, fits) and (kind is bool or type(v) is not bool) for v in each):
            raise ConfigError(
                f"{field.name} ({value!r}) in --moe_config must be of type {kind.__name__}, "
                f"such as {field.default!r}."
            )


def _settle_places(values: argparse.Namespace, *, typed: set[str]) -> None:
    """Leave one way to choose the sparse blocks; a typed flag beats one of the recipe."""
    asked = [flag for flag in PLACES if getattr(values, flag) is not None]
    by_hand = [flag for flag in asked if flag in typed]
    for flag in asked if by_hand else ():
        if flag not in by_hand:
            setattr(values, flag, None)
    if len(by_hand or asked) > 1:
        said = " and ".join(
            f"--{flag} {_words(getattr(values, flag))}" for flag in by_hand or asked
        )
        raise ConfigError(f"{said} each choose the blocks with experts; give one of them.")
    mode = values.moe_mode
    if mode is not None and mode not in MOE_MODES:
        raise ConfigError(f"unknown --moe_mode {mode!r}; {nearest(mode, list(MOE_MODES))}")


def _check_numbers(values: argparse.Namespace) -> None:
    least = min(values.num_experts, default=0)
    if least < 1:
        raise ConfigError(f"--num_experts {_words(values.num_experts)} must be at least 1.")
    if values.top_k_experts > least:
        smallest = "the smallest of " if len(values.num_experts) > 1 else ""
        raise ConfigError(
            f"--top_k_experts ({values.top_k_experts}) cannot exceed {smallest}--num_experts "
            f"({_words(values.num_experts)})."
        )
    if values.moe_every is not None and values.moe_every < 1:
        raise ConfigError(f"--moe_every {values.moe_every} must be at least 1.")
    if not 0 <= values.upcycle_noise < math.inf:
        raise ConfigError(f"--upcycle_noise {values.upcycle_noise} must be finite, at least 0.")
    if not 0 <= values.upcycle_drop <= 1:
        raise ConfigError(
            f"--upcycle_drop {values.upcycle_drop} must lie in [0, 1]: the share of hidden units "
            "that each expert draws anew."
        )


def _words(value: Any) -> str:
    """A value as it is typed."""
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def expert_layout(values: argparse.Namespace) -> int:
    """The expert-parallel size of the run; rank 0 warns of one that reaches beyond a node.

    Raises:
        ParallelismError: experts (of some layer) or processes do not divide.
    """
    if not values.moe_enable:
        return 1
    world, per_node = runtime.world_size(), runtime.local_world_size()
    common = math.gcd(*values.num_experts)
    if values.ep_size == 0:
        return default_ep_size(num_experts=common, world_size=world, local_world_size=per_node)
    _check_every_layer(values, common=common, world=world)
    if values.ep_size > per_node and runtime.is_main():
        logger.warning(
            "--ep_size %d is more than the %d processes of a node: the exchange between nodes "
            "takes longer than experts of CLIP's width compute; --ep_size %d stays inside.",
            values.ep_size,
            per_node,
            default_ep_size(num_experts=common, world_size=world, local_world_size=per_node),
        )
    return values.ep_size


def _check_every_layer(values: argparse.Namespace, *, common: int, world: int) -> None:
    """`check_layout` for every number of experts; a pyramid's error says which layer it is."""
    size = values.ep_size
    for place, count in enumerate(values.num_experts):
        if len(values.num_experts) > 1 and count % size:
            best = math.gcd(common, world)
            fits = ", ".join(str(n) for n in range(1, best + 1) if best % n == 0)
            raise ParallelismError(
                f"--num_experts {_words(values.num_experts)}: the {count} experts of sparse block "
                f"number {place + 1} must be a multiple of --ep_size ({size}); possible for all "
                f"blocks with {world} processes: {fits}."
            )
        check_layout(num_experts=count, ep_size=size, world_size=world)


def check_backend(values: argparse.Namespace, *, ep_size: int) -> None:
    """Refuse an unknown backend and settings that DeepSpeed's layer lacks; warn of what may come.

    Raises:
        ConfigError: an unknown name.
        ParallelismError: settings that DeepSpeed's layer does not have.
    """
    if values.moe_backend not in BACKENDS:
        hint = nearest(values.moe_backend, list(BACKENDS))
        raise ConfigError(f"unknown --moe_backend {values.moe_backend!r}; {hint}")
    wanted = moe_settings(values)
    if values.moe_backend != "deepspeed" or wanted is None:
        return
    settings = expert_settings(wanted)[0]  # layers differ in the number of experts only
    check_stock(settings)
    warning = stock_warning(settings, ep_size=ep_size)
    if warning and runtime.is_main():
        logger.warning(warning)
