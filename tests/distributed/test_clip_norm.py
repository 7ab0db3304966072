"""The norm that ZeRO-0 clips by: dense gradients once, every expert once, on every rank alike."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tests.distributed.harness import run_distributed

pytestmark = pytest.mark.distributed

WORLD = 2


def norms(rank, world_size):
    """`global_norm` with experts spread over both ranks, and without any."""
    from deepspeed.utils import groups

    from mm_moe.training.clip import global_norm

    groups._create_expert_and_data_parallel(WORLD)
    dense, expert, frozen = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    expert.allreduce, expert.group_name = False, f"ep_size_{WORLD}"
    dense.grad = torch.tensor([1.0, 2.0])  # equal on all ranks: reduced already
    expert.grad = torch.full((2,), 2.0) if rank == 0 else torch.tensor([6.0, 0.0])
    half = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    half.grad = torch.full_like(half, 4.0)
    return [
        float(global_norm([dense, expert, frozen])),
        float(global_norm([dense, frozen])),
        float(global_norm([dense, half])),
        float(global_norm([frozen])),
    ]


def test_the_norm_by_hand_on_every_rank():
    expected = [
        math.sqrt(1 + 4 + 8 + 36),  # 7
        math.sqrt(5),
        math.sqrt(5 + 16),
        0.0,
    ]
    for found in run_distributed(norms, WORLD):
        assert found == pytest.approx(expected, rel=1e-6)


def test_a_large_gradient_is_summed_by_rows():
    from mm_moe.training.clip import LARGE, squared_norm

    grad = torch.full((LARGE + 3,), 3.0)  # not a whole number of rows
    grad[-1] = 4.0
    assert float(squared_norm(grad)) == pytest.approx(9.0 * (LARGE + 2) + 16.0, rel=1e-7)
    drawn = torch.randn(2 * LARGE, generator=torch.Generator().manual_seed(0))
    assert float(squared_norm(drawn)) == pytest.approx(
        float(drawn.double().square().sum()), rel=1e-7
    )
    drawn[7] = torch.inf
    assert not math.isfinite(float(squared_norm(drawn)))
