"""The flags of fills, checked before anything is written, and what their experts exchange."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping

from mm_moe.arguments import parse_json
from mm_moe.data.schema import DataSource
from mm_moe.errors import ConfigError
from mm_moe.fill.base import Fill
from mm_moe.models.fill_start import check_fill_options
from mm_moe.models.fusion import TRANSFORMER
from mm_moe.moe.parallel import check_layout, default_ep_size
from mm_moe.registry import FILLS
from mm_moe.training import runtime
from mm_moe.training.exchange import SparseLayer


def fill_layout(values: argparse.Namespace, source: DataSource, *, ep_size: int) -> int:
    """The expert-parallel size of a run whose fill may have experts, too.

    Args:
        values: the flags; `values.ep_size` is 0 where the size is free.
        source: the data set, whose modalities decide how many experts there are.
        ep_size: what fits the other sparse layers.

    Raises:
        ConfigError: an unknown fill or option, or a fill where there can be none.
        ParallelismError: the asked size does not divide the fill's experts.
    """
    options = parse_json("fill_config", values.fill_config)
    if values.fill is None:
        if options:
            raise ConfigError("--fill_config is about a fill; add --fill NAME.")
        return ep_size
    check_fill_options(values.fill, options)
    if values.experts_over:
        raise ConfigError(
            f"--fill {values.fill} is for one model; members of --experts_over take part only "
            "where their modalities are there. Leave one of them out."
        )
    if len(source.modalities) < 2:
        raise ConfigError(
            f"--fill {values.fill} fills what a sample lacks from what it has, and data set "
            f"{source.name!r} has {', '.join(source.modalities)} alone; leave out --fill."
        )
    count = FILLS.resolve(values.fill).count_experts(len(source.modalities), options)
    if not count:
        return ep_size
    world = runtime.world_size()
    if values.ep_size == 0 and _others_have_experts(values):
        return math.gcd(count, ep_size)
    if values.ep_size == 0:
        return default_ep_size(
            num_experts=count, world_size=world, local_world_size=runtime.local_world_size()
        )
    check_layout(num_experts=count, ep_size=values.ep_size, world_size=world)
    return values.ep_size


def _others_have_experts(values: argparse.Namespace) -> bool:
    """Whether other parts of the model have experts, which the layout divides already."""
    fusion = parse_json("fusion_config", values.fusion_config).get("sparse", "none")
    sparse_fusion = values.fusion == TRANSFORMER and fusion != "none"
    return values.moe_enable or values.interaction_experts or sparse_fusion


def fill_exchange(
    fill: Fill | None, *, missing: Mapping[str, float], samples: int
) -> list[SparseLayer]:
    """What each sparse layer of a fill does with a micro-batch on average.

    Args:
        fill: of the model.
        missing: modality -> share of the samples that lack it.
        samples: of the micro-batch.
    """
    if fill is None:
        return []
    cells = samples * sum(missing.values())
    own = sum(1 - share for share in missing.values())
    tokens = cells * fill.shape.num_tokens * (own + (fill.num_supports or own))
    return [
        SparseLayer(
            tokens,
            layer.width,
            layer.experts.w_out.shape[1],
            layer.settings.top_k,
            recomputed=False,
        )
        for layer in fill.sparse_layers().values()
    ]
