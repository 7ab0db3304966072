"""Sigmoid and noisy routers, and noise by place."""

import math

import pytest
import torch
from torch import tensor

from mm_moe.moe.layer import MoELayer
from mm_moe.moe.noise import normal_by_place
from mm_moe.moe.router_noisy import NoisyTopKRouter, squared_variation
from mm_moe.moe.router_sigmoid import TopKSigmoidRouter
from mm_moe.moe.settings import MoESettings


def test_sigmoid_scores_by_hand():
    router = TopKSigmoidRouter(width=1, settings=MoESettings(num_experts=3, top_k=2))
    router.weight.data = tensor([[math.log(3)], [0.0], [-math.log(3)]])
    routing = router(tensor([[1.0]]))
    # sigmoids 3/4 1/2 1/4
    assert routing.expert_TK.tolist() == [[0, 1]]
    torch.testing.assert_close(routing.weight_TK, tensor([[0.6, 0.4]]))
    torch.testing.assert_close(routing.prob_TE, tensor([[1 / 2, 1 / 3, 1 / 6]]))


def noisy(**settings):
    router = NoisyTopKRouter(width=2, settings=MoESettings(num_experts=2, **settings))
    router.weight.data = tensor([[1.0, 0.0], [0.0, 1.0]])
    return router


def test_noise_changes_the_choice_and_not_the_probabilities():
    router, x_TD = noisy(noise_std=2.0), tensor([[1.0, 0.5]])
    calm, shaken = router(x_TD), router(x_TD, None, tensor([[0.0, 1.0]]))
    # noise is 2 / 2 * 1: scores 1.0 and 1.5
    assert calm.expert_TK.item() == 0
    assert shaken.expert_TK.item() == 1
    assert torch.equal(calm.prob_TE, shaken.prob_TE)


def test_load_by_hand():
    router = noisy(noise_std=2.0)  # standard deviation 1
    routing = router(tensor([[1.0, 0.0]]), None, tensor([[0.0, 0.0]]))
    # threshold 1: expert 0 is chosen again with P(z > 0), expert 1 with P(z > 1)
    expected = tensor([0.5, 1 - 0.5 * (1 + math.erf(1 / math.sqrt(2)))])
    torch.testing.assert_close(router._load(routing), expected)


def test_squared_variation_by_hand():
    assert squared_variation(tensor([1.0, 3.0])).item() == pytest.approx(0.25)  # std 1, mean 2
    assert squared_variation(tensor([2.0, 2.0])).item() == 0
    assert squared_variation(tensor([0.0, 0.0])).item() == 0


def test_noise_and_load_are_for_training_only():
    torch.manual_seed(0)
    settings = MoESettings(router="noisy_topk", noise_std=50.0)
    layer = MoELayer(width=3, hidden=4, settings=settings)
    x_TD = torch.randn(30, 3)
    assert set(layer(x_TD)[1].losses) == {"importance", "load", "router_z"}
    assert not torch.equal(layer(x_TD)[1].tokens_E, layer(x_TD)[1].tokens_E)
    layer.eval()
    assert set(layer(x_TD)[1].losses) == {"importance", "router_z"}
    assert torch.equal(layer(x_TD)[0], layer(x_TD)[0])


def test_the_noise_of_a_place_does_not_depend_on_its_neighbours():
    whole_TE = normal_by_place(7, torch.arange(10), 4)
    assert torch.equal(whole_TE[6:], normal_by_place(7, torch.arange(6, 10), 4))
    assert not torch.equal(whole_TE, normal_by_place(8, torch.arange(10), 4))


def test_the_noise_is_standard_normal_and_independent():
    x = normal_by_place(3, torch.arange(50_000), 4)
    assert x.mean(0).abs().max() < 0.02  # 4 standard errors
    assert (x.std(0) - 1).abs().max() < 0.02
    assert (x.flatten().abs() < 1.96).double().mean().item() == pytest.approx(0.95, abs=0.003)
    assert (torch.corrcoef(x.t()) - torch.eye(4)).abs().max() < 0.02
    assert torch.corrcoef(torch.stack([x[1:, 0], x[:-1, 0]]))[0, 1].abs() < 0.02


@pytest.mark.parametrize(
    "settings",
    [{"use_residual": True}, {"num_shared_experts": 2}, {"router": "noisy_topk"}],
    ids=str,
)
def test_no_real_token_still_gives_every_parameter_a_gradient(settings):
    layer = MoELayer(width=3, hidden=4, settings=MoESettings(**settings))
    y, record = layer(torch.randn(2, 3), torch.zeros(2, dtype=torch.bool))
    (y.sum() + sum(record.losses.values())).backward()
    assert all(p.grad is not None and not p.grad.isnan().any() for p in layer.parameters())
