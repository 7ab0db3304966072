"""Capacity and who is dropped, by hand."""

import pytest
import torch
from torch import tensor

from mm_moe.moe.capacity import expert_capacity, first_of_each, within_capacity
from mm_moe.moe.layer import MoELayer
from mm_moe.moe.router import Routing
from mm_moe.moe.settings import MoESettings


@pytest.mark.parametrize(
    ("num_choices", "training", "expected"),
    [
        (16, True, 5),  # 16 / 4 * 1.25
        (17, True, 6),  # 17 / 4 * 1.25 = 5.3, rounded up
        (16, False, 8),  # 16 / 4 * 2
        (0, True, 4),  # never below min_capacity
    ],
)
def test_capacity_by_hand(num_choices, training, expected):
    settings = MoESettings(num_experts=4)
    capacity = expert_capacity(num_choices=num_choices, settings=settings, training=training)
    assert capacity == expected


def test_the_most_probable_rows_stay_and_of_equal_ones_the_first():
    expert_R = tensor([0, 1, 0, 0, 1, 0])
    priority_R = tensor([0.5, 0.1, 0.9, 0.5, 0.2, 0.5])
    keep_R = first_of_each(expert_R, priority_R, 2, num_experts=3)
    assert keep_R.tolist() == [True, True, True, False, True, False]


def routing_of(prob_TE, k):
    prob_TK, expert_TK = prob_TE.topk(k)
    return Routing(prob_TE.log(), prob_TE, expert_TK, prob_TK)


def test_rows_of_another_rank_compete():
    settings = MoESettings(num_experts=2, capacity_factor=0.5, min_capacity=1, drop_tokens=True)
    routing = routing_of(tensor([[0.8, 0.2], [0.6, 0.4]]), 1)
    peer = tensor([[0.0, 0.9], [1.0, 0.7]])  # (expert, probability) rows of the rank before

    def gather(mine):
        return torch.cat([peer, mine]), len(peer)

    # 4 choices, capacity 1: expert 0 takes the peer's 0.9
    kept = within_capacity(routing, settings=settings, training=True, gather_over_ranks=gather)
    assert kept.keep_TK.tolist() == [[False], [False]]
    alone = within_capacity(
        routing, settings=settings, training=True, gather_over_ranks=lambda mine: (mine, 0)
    )
    assert alone.keep_TK.tolist() == [[True], [False]]


def test_the_layer_drops_and_says_how_much():
    settings = MoESettings(num_experts=4, drop_tokens=True, capacity_factor=1.0, min_capacity=1)
    layer = MoELayer(width=3, hidden=4, settings=settings)
    layer.router.weight.data.zero_()  # ties: everyone wants expert 0, which takes 8 / 4 rows
    y_TD, record = layer(torch.randn(8, 3))
    assert record.tokens_E.tolist() == [2, 0, 0, 0]
    assert record.metrics["dropped"].item() == 0.75
    assert (y_TD.abs().sum(-1) > 0).tolist() == [True, True] + [False] * 6
    layer.eval()
    assert layer(torch.randn(8, 3))[1].tokens_E.tolist() == [4, 0, 0, 0]


def test_enough_capacity_is_dropless():
    torch.manual_seed(0)
    free = MoELayer(width=3, hidden=4, settings=MoESettings(top_k=2))
    capped = MoELayer(
        width=3, hidden=4, settings=MoESettings(top_k=2, drop_tokens=True, capacity_factor=4.0)
    )
    capped.load_state_dict(free.state_dict())
    x_TD = torch.randn(20, 3)
    assert torch.equal(free(x_TD)[0], capped(x_TD)[0])
