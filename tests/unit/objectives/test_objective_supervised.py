"""The task loss with a pencil, for every kind of label."""

import math
from types import SimpleNamespace

import pytest
import torch

from finetune.supervised import Supervised, task_loss
from mm_moe.batch import IGNORED_LABEL, Batch
from mm_moe.errors import ConfigError

SINGLE, MULTI, NUMBER = "single_label_classification", "multi_label_classification", "regression"


def test_cross_entropy_by_hand():
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0], [9.0, -9.0]])
    labels = torch.tensor([0, 1, IGNORED_LABEL])
    # probabilities of the labels: 3/4 and 1/2; the third row does not count
    expected = -(math.log(0.75) + math.log(0.5)) / 2
    assert task_loss(logits, labels, SINGLE).item() == pytest.approx(expected, abs=1e-6)


def test_binary_cross_entropy_by_hand():
    logits = torch.tensor([[math.log(3.0), 0.0], [5.0, 5.0]])
    labels = torch.tensor([[1.0, 0.0], [IGNORED_LABEL, IGNORED_LABEL]])
    expected = -(math.log(0.75) + math.log(0.5)) / 2  # two classes of one row
    assert task_loss(logits, labels, MULTI).item() == pytest.approx(expected, abs=1e-6)


def test_absolute_error_by_hand():
    logits = torch.tensor([[1.5], [-2.0], [7.0], [7.0]])
    labels = torch.tensor([1.0, 1.0, IGNORED_LABEL, float("nan")])
    assert task_loss(logits, labels, NUMBER).item() == pytest.approx((0.5 + 3.0) / 2)


BATCHES = {
    SINGLE: torch.tensor([IGNORED_LABEL, 1]),
    MULTI: torch.tensor([[float(IGNORED_LABEL)] * 2, [0.0, 1.0]]),
    NUMBER: torch.tensor([float(IGNORED_LABEL), 1.0]),
}


@pytest.mark.parametrize("problem_type", BATCHES)
def test_an_ignored_row_gets_no_gradient(problem_type):
    logits = torch.randn(2, 1 if problem_type == NUMBER else 2, requires_grad=True)
    task_loss(logits, BATCHES[problem_type], problem_type).backward()
    assert not logits.grad[0].any()
    assert logits.grad[1].all()


@pytest.mark.parametrize("problem_type", BATCHES)
@pytest.mark.parametrize("rows", [2, 0])
def test_a_batch_without_a_label_is_zero_and_connected(problem_type, rows):
    logits = torch.randn(rows, 1 if problem_type == NUMBER else 2, requires_grad=True)
    labels = torch.full_like(BATCHES[problem_type], IGNORED_LABEL)[:rows]
    loss = task_loss(logits, labels, problem_type)
    assert loss.item() == 0.0
    loss.backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_half_precision_logits_are_lossless_from_there():
    logits = torch.tensor([[100.0, 0.0]], dtype=torch.bfloat16)
    loss = task_loss(logits, torch.tensor([1]), SINGLE)
    assert loss.dtype == torch.float32
    assert loss.item() == 100.0


def test_what_has_no_supervised_loss():
    with pytest.raises(ConfigError, match="'none' has no supervised loss; take one of"):
        task_loss(torch.zeros(1, 2), torch.tensor([0]), "none")
    with pytest.raises(ConfigError, match="no labels; take the objective contrastive"):
        task_loss(torch.zeros(1, 2), None, SINGLE)


def test_the_objective_adds_what_routers_and_prompts_ask_for():
    output = SimpleNamespace(
        logits=torch.zeros(1, 2), losses={"load_balance": torch.tensor(0.25, dtype=torch.bfloat16)}
    )
    batch = Batch.of(["a"], torch.ones(1, 2, dtype=torch.bool), {}, torch.tensor([1]))
    loss, parts, returned = Supervised(SINGLE)(lambda **_: output, batch)
    assert list(parts) == ["task", "load_balance"]
    assert loss.item() == pytest.approx(math.log(2) + 0.25)
    assert loss.dtype == torch.float32
    assert returned is output
