"""Layouts that can and cannot work (no process is started)."""

import pytest
import torch

from mm_moe.errors import ParallelismError
from mm_moe.moe.layer import MoELayer
from mm_moe.moe.parallel import (
    check_layout,
    default_ep_size,
    gather_experts,
    is_expert_parameter,
    slice_experts,
)
from mm_moe.moe.settings import MoESettings


@pytest.mark.parametrize(
    ("num_experts", "ep_size", "world_size", "words"),
    [
        (6, 4, 8, r"num_experts \(6\) must be a multiple of ep_size \(4\).*8 processes: 1, 2\."),
        (8, 4, 6, r"processes \(6\) must be a multiple of ep_size \(4\).*8 experts: 1, 2\."),
        (4, 0, 2, r"ep_size \(0\) must be at least 1; possible: 1, 2\."),
    ],
)
def test_a_layout_that_cannot_work_lists_those_that_can(num_experts, ep_size, world_size, words):
    with pytest.raises(ParallelismError, match=words):
        check_layout(num_experts=num_experts, ep_size=ep_size, world_size=world_size)


@pytest.mark.parametrize(
    ("num_experts", "world_size", "local_world_size", "expected"),
    [(4, 1, 1, 1), (4, 2, 2, 2), (8, 16, 8, 8), (8, 6, 6, 2), (64, 16, 8, 8), (5, 4, 4, 1)],
)
def test_the_default_size_splits_both_and_stays_in_a_node(
    num_experts, world_size, local_world_size, expected
):
    size = default_ep_size(
        num_experts=num_experts, world_size=world_size, local_world_size=local_world_size
    )
    assert size == expected
    check_layout(num_experts=num_experts, ep_size=size, world_size=world_size)


def test_a_plain_layer_is_whole_already():
    layer = MoELayer(width=2, hidden=3, settings=MoESettings())
    whole = torch.arange(4)
    assert torch.equal(gather_experts(whole, layer), whole)
    assert torch.equal(slice_experts(whole, layer), whole)
    assert not any(is_expert_parameter(parameter) for parameter in layer.parameters())
