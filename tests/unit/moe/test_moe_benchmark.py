"""What the layer benchmark measures, by hand."""

import argparse

import pytest
import torch

from eval.benchmarks.moe_layer import (
    Case,
    cases,
    figures,
    forced_choices,
    forced_tokens,
    mean_ratio,
    router_weight,
)
from eval.benchmarks.peak_memory import PeakMemory


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("skew", [1.0, 2.0, 4.0])
def test_the_fullest_expert_gets_skew_times_the_mean(top_k, skew):
    case = Case(1, tokens=64, experts=8, top_k=top_k, skew=skew, capacity=False)
    expert_TK = forced_choices(64, case)
    rows_E = torch.bincount(expert_TK.flatten(), minlength=8)
    assert rows_E.sum() == 64 * top_k
    assert rows_E[0] == skew * 8 * top_k
    assert rows_E[1:].max() - rows_E[1:].min() <= 1
    if top_k == 2:
        assert (expert_TK[:, 0] != expert_TK[:, 1]).all()


def test_the_router_follows_the_forced_choices():
    case = Case(1, tokens=64, experts=8, top_k=2, skew=2.0, capacity=False)
    logit_TE = forced_tokens(64, case, 16) @ router_weight(case, 16).t()
    assert torch.equal(logit_TE.topk(2).indices, forced_choices(64, case))


def test_a_load_that_one_token_would_have_to_carry_twice_is_left_out():
    args = argparse.Namespace(tokens=[64], experts=[4], top_k=[1, 2], skew=[1.0, 4.0], quick=False)
    found = [(case.top_k, case.skew, case.capacity) for case in cases(args, 1)]
    assert found == [(1, 1, False), (1, 4, False), (2, 1, False), (1, 1, True), (2, 1, True)]


def row(skew, ours, peer, **changes):
    return {
        "processes": 1,
        "tokens": 8,
        "experts": 4,
        "top_k": 1,
        "skew": skew,
        "capacity": False,
        "time_s": {"ours": ours, "deepspeed": peer, "dense": 2.0},
        "peak_bytes": {"ours": 1, "deepspeed": 4, "dense": 1},
        "percent_of_matmul": 50.0,
        **changes,
    }


def test_figures_by_hand():
    rows = [row(1, 1.0, 2.0), row(1, 1.0, 8.0, processes=2), row(4, 3.0, 12.0)]
    found = figures(rows)
    assert found["time_vs_deepspeed_balanced"] == 0.25  # sqrt(1/2 * 1/8)
    assert found["time_vs_deepspeed_skew4"] == 0.25
    assert found["memory_vs_deepspeed_skew4"] == 0.25
    assert found["time_vs_dense_k1"] == 0.5
    assert found["percent_of_matmul_rate"] == 50.0
    assert found["time_vs_deepspeed_capacity"] is None


def test_scaling_by_hand():
    rows = [row(1, 1.0, 1.0), row(1, 3.0, 1.0, tokens=16), row(1, 2.0, 1.0, tokens=16, top_k=2)]
    found = figures(rows)
    assert (
        found["time_per_token_most_vs_fewest"] == 1.5
    )  # 3 s for twice the tokens; k 2 has no pair
    assert found["time_most_vs_fewest_experts"] is None


def test_a_peer_that_is_not_there_gives_no_ratio():
    assert mean_ratio([{"time_s": {"ours": 1.0}}], "time_s", "deepspeed") is None


def test_peak_memory_by_hand():
    with PeakMemory() as memory:
        first = torch.zeros(1000)  # 4,000 bytes live
        second = first + 1  # 8,000
        del first  # 4,000
        third = second * 2  # 8,000
        _ = third.view(10, 100)  # a view costs nothing
        torch.mul(second, 3, out=third)  # neither does writing in place
    assert memory.peak == 8000
    assert memory.live == 8000
