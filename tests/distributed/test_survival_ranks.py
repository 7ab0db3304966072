"""Cox's loss over 2 and 4 ranks equals one process with all rows, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from finetune.survival import TIES, cox_loss
from tests.distributed.harness import run_distributed

pytestmark = pytest.mark.distributed

ROWS = 12
# events: on all ranks, on one rank alone, nowhere; ties across ranks; a rank without labels
TIMES = [5, 2, 3, 2, 8, 1, 3, 2, 9, 3, 4, 2]
EVENTS = [[1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 0, 1], [0] * 9 + [1] * 3, [0] * ROWS]
CASES = [(ties, events, bare) for ties in TIES for events in range(3) for bare in (False, True)]


def loss_and_gradients(part, ties, events, bare):
    """[loss, gradients] of some rows."""
    torch.manual_seed(1)
    model = nn.Linear(4, 1).double()
    x = torch.randn(ROWS, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    labels = torch.tensor([TIMES, EVENTS[events]], dtype=torch.float64).T.clone()
    if bare:
        labels[:3] = -100
    value = cox_loss(model(x[part]).squeeze(-1), labels[part], ties=ties)
    value.backward()
    return [value.detach(), *(p.grad for p in model.parameters())]


def averaged(rank, world_size):
    """Per case: what the mean over ranks gives."""
    own = slice(rank * ROWS // world_size, (rank + 1) * ROWS // world_size)
    found = []
    for case in CASES:
        values = loss_and_gradients(own, *case)
        for value in values:
            dist.all_reduce(value)
        found.append([value / world_size for value in values])
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_equal_one_process(world_size):
    alone = [loss_and_gradients(slice(None), *case) for case in CASES]
    assert alone[0][0] > 0
    for rank in run_distributed(averaged, world_size):
        for case, ours, whole in zip(CASES, rank, alone, strict=True):
            for a, b in zip(ours, whole, strict=True):
                assert torch.allclose(a, b, rtol=0, atol=1e-12), case
