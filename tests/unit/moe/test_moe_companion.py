"""What works beside the experts, by hand."""

import pytest
import torch

from mm_moe.moe.companion import Residual, SharedExpert


def constant(module, value):
    """Make a feed-forward return `value` everywhere."""
    for parameter in module.parameters():
        parameter.data.zero_()
    module.fc2.bias.data.fill_(value)
    return module


def test_a_shared_expert_is_added():
    shared = constant(SharedExpert(width=2, hidden=3, activation="gelu"), 5.0)
    assert shared.join(torch.zeros(1, 2), torch.ones(1, 2)).tolist() == [[6.0, 6.0]]


def test_a_residual_is_mixed_by_weights_that_sum_to_one():
    residual = constant(Residual(width=2, hidden=3, activation="gelu"), 5.0)
    residual.coefficient.bias.data = torch.tensor([3.0, 1.0]).log()
    # 3/4 * 1 + 1/4 * 5
    mixed = residual.join(torch.zeros(1, 2), torch.ones(1, 2))
    assert mixed.tolist() == [[pytest.approx(2.0), pytest.approx(2.0)]]
