"""Batch normalisation over 2 processes, one of them without rows, equals one process."""

from __future__ import annotations

import pytest
import torch

from mm_moe.backbones.small import SmallBackbone
from mm_moe.moe.parallel import make_expert_parallel
from tests.distributed.harness import run_distributed

pytestmark = pytest.mark.distributed
SETTINGS = {"arrays": {"image": {"shape": [8, 8]}}, "towers": {"image": {"channels": 2}}}
SPLITS = ([5, 0], [2, 3])  # rows of each process


def rows() -> torch.Tensor:
    return torch.randn(5, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def backbone() -> SmallBackbone:
    torch.manual_seed(0)
    return SmallBackbone(SETTINGS, modalities=("image",)).double().train()


def step(model: SmallBackbone, x: torch.Tensor, share: float) -> dict[str, torch.Tensor]:
    """Gradients of the mean square over all five rows, and the statistics."""
    feature, _ = model.encode("image", {"values": x} if len(x) else None)
    used = feature if len(x) else 0 * feature
    (used.square().sum() * share).backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    return found | dict(model.named_buffers())


def on_rank(rank: int, world_size: int) -> list[dict[str, torch.Tensor]]:
    results = []
    for counts in SPLITS:
        model = backbone()
        make_expert_parallel(model, ep_size=1)
        part = rows().split(counts)[rank]
        results.append(step(model, part, world_size / 5))  # its mean over ranks is the loss
    return results


def test_two_processes_equal_one():
    alone = step(backbone(), rows(), 1 / 5)
    ranks = run_distributed(on_rank, 2)
    for case in range(len(SPLITS)):
        for name, expected in alone.items():
            found = [ranks[rank][case][name] for rank in range(2)]
            if "running" in name:
                assert torch.allclose(found[0], expected, atol=1e-12), name
                assert torch.equal(found[0], found[1]), name
            else:
                assert torch.allclose((found[0] + found[1]) / 2, expected, atol=1e-10), name
