"""Objectives over several ranks equal one process with the whole batch, however uneven they are.

DeepSpeed averages gradients over ranks, so that is what is compared.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from finetune.supervised import task_loss
from mm_moe.batch import IGNORED_LABEL
from pretrain.contrastive import contrastive_loss
from tests.distributed.harness import run_distributed

pytestmark = pytest.mark.distributed

ROWS = 4  # per rank
# Which of the 2 x 4 rows are pairs: uneven, none on one rank, all, none at all.
PAIRS = [
    [1, 0, 1, 1, 0, 0, 0, 1],
    [0, 0, 0, 0, 1, 1, 0, 1],
    [1, 1, 1, 1, 1, 1, 1, 1],
    [0, 0, 0, 0, 0, 0, 0, 0],
]
I = IGNORED_LABEL  # noqa: E741
LABELS = {
    "single_label_classification": torch.tensor([0, I, 2, 1, I, I, I, 2]),
    "multi_label_classification": torch.tensor([[0.0, 1, 1]] * 2 + [[I] * 3] * 5 + [[1.0, 0, 0]]),
    "regression": torch.tensor([I, I, I, I, 0.5, -1.0, I, 2.0]),
}


class Towers(nn.Module):
    """Two linear towers and CLIP's temperature."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.image, self.text = nn.Linear(5, 6), nn.Linear(7, 6)
        self.logit_scale = nn.Parameter(torch.tensor([2.0]))


def rows():
    generator = torch.Generator().manual_seed(2)
    return (torch.randn(2 * ROWS, width, generator=generator) for width in (5, 7))


def contrastive(part: slice, pairs: list[int]):
    """(loss, gradients) of some rows."""
    model, (image, text) = Towers(), rows()
    complete = torch.tensor(pairs, dtype=torch.bool)[part]
    loss = contrastive_loss(
        model.image(image[part]), model.text(text[part]), complete, model.logit_scale
    )
    loss.sum().backward()
    return loss.detach().sum(), [parameter.grad for parameter in model.parameters()]


def supervised(part: slice, problem_type: str):
    """(loss, gradients) of some rows."""
    torch.manual_seed(3)
    model = nn.Linear(5, 1 if problem_type == "regression" else 3)
    image, _ = rows()
    loss = task_loss(model(image[part]), LABELS[problem_type][part], problem_type)
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()]


def means_over_ranks(rank, world_size):
    """Every case on this rank's rows, averaged as DeepSpeed would."""
    part = slice(rank * ROWS, (rank + 1) * ROWS)
    results = [contrastive(part, pairs) for pairs in PAIRS]
    results += [supervised(part, kind) for kind in LABELS]
    for loss, gradients in results:
        for value in (loss, *gradients):
            dist.all_reduce(value)
            value /= world_size
    return results


@pytest.fixture(scope="module")
def on_two_ranks():
    return run_distributed(means_over_ranks, 2)[0]


@pytest.mark.parametrize("case", range(len(PAIRS) + len(LABELS)))
def test_two_ranks_equal_one_process_with_all_rows(on_two_ranks, case):
    if case < len(PAIRS):
        loss, gradients = contrastive(slice(None), PAIRS[case])
    else:
        loss, gradients = supervised(slice(None), list(LABELS)[case - len(PAIRS)])
    found_loss, found = on_two_ranks[case]
    assert found_loss.item() == pytest.approx(loss.item(), abs=1e-6)
    for mine, theirs in zip(found, gradients, strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-6)


def test_the_cases_mean_something():
    losses = [contrastive(slice(None), pairs)[0].item() for pairs in PAIRS]
    assert losses[3] == 0.0
    assert min(losses[:3]) > 0.1
    assert max(grad.abs().max() for grad in contrastive(slice(None), PAIRS[0])[1]) > 1e-2
