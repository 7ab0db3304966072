"""Every contrastive loss and variant over 2 and 4 ranks equals one process with all rows.

DeepSpeed averages gradients over ranks, so that is what is compared; in float64.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pretrain.contrastive import LOSSES, VARIANTS, contrastive_loss
from tests.distributed.harness import run_distributed

pytestmark = pytest.mark.distributed

ROWS = 12
# Which of the 12 rows are pairs: uneven and none on a rank of 2 and of 4, all, none at all.
PAIRS = [
    [1, 0, 1, 0, 0, 0, 1, 1, 1, 0, 1, 0],
    [0, 0, 0, 0, 0, 0, 1, 0, 1, 1, 1, 1],
    [1] * ROWS,
    [0] * ROWS,
]
CASES = list(itertools.product(LOSSES, VARIANTS, range(len(PAIRS))))


class Towers(nn.Module):
    """Two linear towers with scale and bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.image, self.text = nn.Linear(5, 6), nn.Linear(7, 6)
        self.logit_scale = nn.Parameter(torch.tensor([1.5]))
        self.logit_bias = nn.Parameter(torch.tensor([-2.0]))


def loss_and_gradients(part: slice, loss: str, variant: str, pairs: list[int]):
    """[loss, gradients of all parameters] of some rows."""
    model = Towers().double()
    generator = torch.Generator().manual_seed(2)
    image, text = (torch.randn(ROWS, n, generator=generator).double() for n in (5, 7))
    value = contrastive_loss(
        model.image(image[part]),
        model.text(text[part]),
        torch.tensor(pairs, dtype=torch.bool)[part],
        model.logit_scale,
        logit_bias=model.logit_bias,
        loss=loss,
        variant=variant,
        chunk=2,
    )
    value.backward()
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    return [value.detach(), *grads]


def means_over_ranks(rank: int, world_size: int):
    """Every case on this rank's rows, averaged as DeepSpeed would."""
    size = ROWS // world_size
    part = slice(rank * size, (rank + 1) * size)
    found = {}
    for loss, variant, number in CASES:
        values = loss_and_gradients(part, loss, variant, PAIRS[number])
        for value in values:
            dist.all_reduce(value)
            value /= world_size
        found[loss, variant, number] = values
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_equal_one_process_with_all_rows(world_size):
    found = run_distributed(means_over_ranks, world_size)[0]
    for loss, variant, number in CASES:
        expected = loss_and_gradients(slice(None), loss, "gather", PAIRS[number])
        for mine, whole in zip(found[loss, variant, number], expected, strict=True):
            assert (mine - whole).abs().max() <= 1e-10, (loss, variant, number)


def test_the_cases_mean_something():
    for loss in LOSSES:
        values = [loss_and_gradients(slice(None), loss, "gather", pairs) for pairs in PAIRS]
        assert values[3][0] == 0
        assert all(value[0] > 0.1 and value[1].abs().max() > 1e-3 for value in values[:3])
