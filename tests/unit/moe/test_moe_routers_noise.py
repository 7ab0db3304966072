"""Routers with noise, by hand: jitter on the input, sampling on the logits."""

import math

import pytest
import torch
from torch import tensor

from mm_moe.moe.layer import MoELayer
from mm_moe.moe.noise import Noise, gumbel_by_place, uniform_by_place
from mm_moe.moe.router_jitter import JitterTopKRouter
from mm_moe.moe.router_rsample import RSampleTopKRouter
from mm_moe.moe.settings import MoESettings


def router_of(kind, **settings):
    router = kind(width=2, settings=MoESettings(num_experts=2, **settings))
    router.weight.data = tensor([[1.0, 0.0], [0.0, 1.0]])
    return router


def test_jitter_scales_the_input_by_hand():
    router = router_of(JitterTopKRouter, jitter_eps=0.5)
    x_TD = tensor([[2.0, 1.5]])
    assert router(x_TD).expert_TK.item() == 0
    routing = router(x_TD, None, tensor([[0.0, 1.0]]))
    # factors 1 - .5 and 1 + .5
    assert routing.logit_TE.tolist() == [[1.0, 2.25]]
    assert routing.expert_TK.item() == 1


def test_sampling_chooses_by_noise_and_weighs_without():
    router = router_of(RSampleTopKRouter, top_k=2)
    x_TD = tensor([[math.log(3), 0.0]])
    routing = router(x_TD, None, tensor([[0.0, 2.0]]))
    assert routing.expert_TK.tolist() == [[1, 0]]
    torch.testing.assert_close(routing.weight_TK, tensor([[0.25, 0.75]]))
    assert router(x_TD).expert_TK.tolist() == [[0, 1]]


def test_sampled_first_choices_follow_the_softmax():
    layer = MoELayer(width=1, hidden=2, settings=MoESettings(num_experts=2, router="rsample_topk"))
    layer.router.weight.data = tensor([[math.log(3)], [0.0]])
    torch.manual_seed(0)
    share = layer(torch.ones(20_000, 1))[1].tokens_E[0].item() / 20_000
    assert share == pytest.approx(0.75, abs=0.015)  # 5 standard errors
    layer.eval()
    assert layer(torch.ones(10, 1))[1].tokens_E.tolist() == [10, 0]


def test_uniform_and_gumbel_have_their_moments():
    place_T = torch.arange(50_000)
    uniform = uniform_by_place(1, place_T, 2)
    assert 0 < uniform.min() < uniform.max() < 1
    assert (uniform.mean(0) - 0.5).abs().max() < 0.006  # 4 standard errors
    assert (uniform.var(0) - 1 / 12).abs().max() < 0.002
    gumbel = gumbel_by_place(1, place_T, 2)
    assert (gumbel.mean(0) - 0.5772).abs().max() < 0.025
    assert (gumbel.var(0) - math.pi**2 / 6).abs().max() < 0.07


@pytest.mark.parametrize("draw", [uniform_by_place, gumbel_by_place])
def test_a_part_of_the_batch_gets_its_part_of_the_noise(draw):
    torch.manual_seed(5)
    whole = Noise(draw, 3).of_batch(
        7, device=torch.device("cpu"), gather_over_ranks=lambda mine: (mine, 0)
    )

    def gather(mine):  # the second of two ranks; the first has two tokens and the seed
        torch.manual_seed(5)
        first = torch.tensor([[torch.randint(1 << 62, ()).item(), 2]])
        return torch.cat([first, mine]), 1

    torch.manual_seed(6)
    part = Noise(draw, 3).of_batch(5, device=torch.device("cpu"), gather_over_ranks=gather)
    assert torch.equal(part, whole[2:])


def test_no_noise_is_wanted_where_its_size_is_zero():
    assert router_of(JitterTopKRouter, jitter_eps=0.0).wanted_noise() is None
    settings = MoESettings(router="noisy_topk", noise_std=0.0)
    assert MoELayer(width=2, hidden=2, settings=settings).router.wanted_noise() is None
