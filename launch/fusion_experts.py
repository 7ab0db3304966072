"""The experts of the fusion transformer: how flags spread them, and what they exchange."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from torch import nn

from mm_moe.arguments import parse_json
from mm_moe.errors import ParallelismError
from mm_moe.models.configuration import MultimodalMoEConfig
from mm_moe.models.fusion import TRANSFORMER
from mm_moe.models.fusion_transformer import TransformerHead, TransformerSettings
from mm_moe.moe.parallel import check_layout, default_ep_size
from mm_moe.training import runtime
from mm_moe.training.exchange import SparseLayer


def fusion_layout(values: argparse.Namespace, *, ep_size: int) -> int:
    """The expert-parallel size of a run whose fusion may have experts, too.

    Args:
        values: the flags; `values.ep_size` is 0 where the size is free.
        ep_size: what fits the other sparse layers.

    Raises:
        ConfigError: options of the fusion that cannot work.
        ParallelismError: the asked size does not divide the fusion's experts.
    """
    if values.fusion != TRANSFORMER:
        return ep_size
    settings = TransformerSettings.from_dict(parse_json("fusion_config", values.fusion_config))
    if settings.sparse == "none":
        return ep_size
    count, world = settings.num_experts, runtime.world_size()
    if values.ep_size == 0:
        other = math.gcd(*values.num_experts) if values.moe_enable else count
        return default_ep_size(
            num_experts=math.gcd(count, other),
            world_size=world,
            local_world_size=runtime.local_world_size(),
        )
    if count % values.ep_size:
        raise ParallelismError(
            f"fusion_config.num_experts ({count}) must be a multiple of --ep_size "
            f"({values.ep_size}); try {-(-count // values.ep_size) * values.ep_size}."
        )
    check_layout(num_experts=count, ep_size=values.ep_size, world_size=world)
    return values.ep_size


def plan_fusion(
    config: MultimodalMoEConfig, *, router: str, planned: Sequence[str], notes: list[str]
) -> None:
    """Give a fusion's experts the router that plans are made with, in place.

    Args:
        config: of the model.
        router: that one.
        planned: routers that need no replacement.
        notes: gets a line if there was one to replace.
    """
    settings = config.fusion_settings.transformer
    if config.fusion != TRANSFORMER or settings.sparse == "none" or settings.router in planned:
        return
    config.fusion_options = {**config.fusion_options, "router": router}
    notes.append(f"activations of the fusion's router {settings.router!r} as of {router!r}")


def fusion_exchange(head: nn.Module | None, *, modality_rows: float) -> list[SparseLayer]:
    """What each sparse block of a fusion transformer does with a micro-batch; else nothing.

    Args:
        head: of the model.
        modality_rows: present (sample, modality) pairs of a micro-batch.
    """
    if not isinstance(head, TransformerHead):
        return []
    return [
        SparseLayer(
            modality_rows * head.num_tokens,
            layer.width,
            layer.experts.w_out.shape[1],
            layer.settings.top_k,
            recomputed=False,
        )
        for layer in head.sparse_layers().values()
    ]
