"""Soft-target losses with a pencil."""

import math
from types import SimpleNamespace

import pytest
import torch

from finetune.soft_targets import SoftBce, SoftCrossEntropy, soft_bce, soft_cross_entropy
from mm_moe.batch import IGNORED_LABEL, Batch
from mm_moe.errors import ConfigError

MULTI = "multi_label_classification"
LOG3 = math.log(3.0)
NONE = [float(IGNORED_LABEL)] * 2


def test_bce_is_summed_over_classes_and_averaged_over_rows():
    logits = torch.tensor([[LOG3, 0.0], [0.0, 0.0], [9.0, 9.0]])
    targets = torch.tensor([[0.6, 0.0], [0.0, 0.0], NONE])
    # sigmoids 3/4 and 1/2; row 0: -.6 ln 3/4 - .4 ln 1/4 - ln 1/2; row 1 has no share: 2 ln 2
    first = -0.6 * math.log(0.75) - 0.4 * math.log(0.25) + math.log(2)
    total, count = soft_bce(logits, targets)
    assert total.item() == pytest.approx(first + 2 * math.log(2), abs=1e-6)
    assert count == 2


def test_cross_entropy_to_normalised_shares():
    logits = torch.tensor([[LOG3, 0.0], [0.0, 0.0], [9.0, 9.0]])
    targets = torch.tensor([[0.6, 0.3], [0.0, 0.0], NONE])
    # shares 2/3 and 1/3 of probabilities 3/4 and 1/4; the row without a share takes no part
    total, count = soft_cross_entropy(logits, targets)
    assert total.item() == pytest.approx(-(2 * math.log(0.75) + math.log(0.25)) / 3, abs=1e-6)
    assert count == 1


@pytest.mark.parametrize("kind", [SoftBce, SoftCrossEntropy])
@pytest.mark.parametrize("rows", [2, 0])
def test_a_batch_without_a_label_is_zero_and_connected(kind, rows):
    logits = torch.randn(rows, 2, requires_grad=True)
    output = SimpleNamespace(logits=logits, losses={"z": torch.tensor(0.25)})
    present = torch.ones(rows, 2, dtype=torch.bool)
    batch = Batch.of(["a", "b"][:rows], present, {}, torch.tensor([NONE, NONE])[:rows])
    loss, parts, _ = kind(MULTI)(lambda **_: output, batch)
    assert (loss.item(), parts["task"].item()) == (0.25, 0.0)
    loss.backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_only_for_labels_that_are_shares():
    with pytest.raises(ConfigError, match="take --objective supervised"):
        SoftCrossEntropy("single_label_classification")
