"""The sparse layer against a dense reference that computes every expert for every token."""

import pytest
import torch
from torch import nn, tensor

from mm_moe.moe.dispatch import LocalDispatcher
from mm_moe.moe.experts import ACTIVATIONS
from mm_moe.moe.layer import MoELayer, moe_layers
from mm_moe.moe.router import Routing
from mm_moe.moe.settings import MoESettings


def make(top_k=2, num_experts=4, width=6, hidden=8, **settings):
    torch.manual_seed(1)
    layer = MoELayer(
        width=width,
        hidden=hidden,
        settings=MoESettings(num_experts=num_experts, top_k=top_k, **settings),
    ).double()
    nn.init.normal_(layer.router.weight)
    nn.init.normal_(layer.experts.b_in)
    nn.init.normal_(layer.experts.b_out)
    return layer


def dense(layer, x_TD):
    """Every expert for every token, weighted by 0 where it is not chosen."""
    routing, experts = layer.router(x_TD), layer.experts
    h_ETF = torch.einsum("td,edf->etf", x_TD, experts.w_in) + experts.b_in.unsqueeze(1)
    h_ETF = ACTIVATIONS[experts.activation].forward(h_ETF)
    y_ETD = torch.einsum("etf,efd->etd", h_ETF, experts.w_out) + experts.b_out.unsqueeze(1)
    weight_TE = torch.zeros_like(routing.prob_TE).scatter(-1, routing.expert_TK, routing.weight_TK)
    return torch.einsum("te,etd->td", weight_TE, y_ETD)


class Doubler(nn.Module):
    """Experts that multiply the rows of expert e by 10 ** e and remember what they saw."""

    def forward(self, x_RD, rows_E):
        self.seen = x_RD.flatten().tolist()
        return x_RD * torch.repeat_interleave(10.0 ** torch.arange(len(rows_E)), rows_E).unsqueeze(
            1
        )


def routing_of(expert_TK, weight_TK, num_experts, keep_TK=None):
    prob_TE = torch.full((len(expert_TK), num_experts), 1 / num_experts)
    return Routing(prob_TE.log(), prob_TE, expert_TK, weight_TK, keep_TK)


def test_dispatch_order_by_hand():
    experts = Doubler()
    routing = routing_of(
        tensor([[2, 0], [0, 1], [2, 1]]), tensor([[0.5, 0.5], [1.0, 0.0], [0.25, 0.75]]), 3
    )
    y_TD, tokens_E = LocalDispatcher()(tensor([[1.0], [2.0], [3.0]]), routing, experts)
    assert experts.seen == [1, 2, 2, 3, 1, 3]  # expert 0: tokens 0 1; expert 1: 1 2; expert 2: 0 2
    assert tokens_E.tolist() == [2, 2, 2]
    # token 0: .5 * 100 + .5 * 1; token 1: 1 * 2; token 2: .25 * 300 + .75 * 30
    assert y_TD.flatten().tolist() == [50.5, 2.0, 97.5]


def test_dropped_choices_move_nothing_and_get_no_gradient():
    experts = Doubler()
    keep_TK = tensor([[True, False], [False, False], [False, True]])
    weight_TK = tensor([[0.5, 0.5], [1.0, 0.0], [0.25, 0.75]], requires_grad=True)
    x_TD = tensor([[1.0], [2.0], [3.0]], requires_grad=True)
    routing = routing_of(tensor([[2, 0], [0, 1], [2, 1]]), weight_TK, 3, keep_TK)
    y_TD, tokens_E = LocalDispatcher()(x_TD, routing, experts)
    assert experts.seen == [3, 1]
    assert tokens_E.tolist() == [0, 1, 1]
    assert y_TD.flatten().tolist() == [50.0, 0.0, 22.5]
    y_TD.sum().backward()
    assert x_TD.grad.flatten().tolist() == [50.0, 0.0, 7.5]
    assert weight_TK.grad.tolist() == [[100.0, 0.0], [0.0, 0.0], [0.0, 30.0]]


@pytest.mark.parametrize("keep", [True, False])
def test_every_choice_dropped_on_a_rank_is_legal(keep):
    x_TD = torch.ones(2, 1, requires_grad=True)
    routing = routing_of(tensor([[0], [1]]), torch.ones(2, 1), 2, torch.full((2, 1), keep))
    y_TD, _ = LocalDispatcher()(x_TD, routing, Doubler())
    y_TD.sum().backward()
    assert y_TD.flatten().tolist() == ([1.0, 10.0] if keep else [0.0, 0.0])
    assert x_TD.grad is not None


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_values_and_gradients_equal_the_dense_reference(top_k):
    layer = make(top_k)
    x_TD = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    seed_TD = torch.randn_like(x_TD)
    y_TD, record = layer(x_TD)
    reference = dense(layer, x_TD)
    torch.testing.assert_close(y_TD, reference, rtol=1e-12, atol=1e-12)
    assert record.tokens_E.sum().item() == 11 * top_k
    wanted = [x_TD, *layer.parameters()]
    ours = torch.autograd.grad((y_TD * seed_TD).sum(), wanted)
    theirs = torch.autograd.grad((reference * seed_TD).sum(), wanted)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("top_k", [2, 3])
def test_gradcheck_with_losses(top_k):
    # one choice is left out: its weight is constant 1 by design, with a straight-through gradient
    layer = make(top_k, num_experts=3, width=3, hidden=4)
    x_TD = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    names, values = zip(*layer.named_parameters(), strict=True)

    def run(x_TD, *values):
        state = dict(zip(names, values, strict=True))
        y_TD, record = torch.func.functional_call(layer, state, (x_TD,))
        return y_TD, *record.losses.values()

    assert torch.autograd.gradcheck(run, (x_TD, *values))


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_a_masked_token_is_as_if_it_were_not_there(top_k):
    layer = make(top_k)
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    mask = tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()
    y, record = layer(x, mask)
    kept, alone = layer(x[mask])
    torch.testing.assert_close(y[mask], kept, rtol=1e-12, atol=1e-12)
    assert y[~mask].abs().max() == 0
    assert torch.equal(record.tokens_E, alone.tokens_E)
    for name in record.losses:
        torch.testing.assert_close(record.losses[name], alone.losses[name])


def test_no_real_token_gives_zeros_and_a_gradient_for_everything():
    layer = make()
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    y, record = layer(x, torch.zeros(2, 3, dtype=torch.bool))
    (y.sum() + sum(record.losses.values())).backward()
    assert y.abs().max() == 0
    assert record.tokens_E.tolist() == [0, 0, 0, 0]
    assert all(value == 0 for value in [*record.losses.values(), *record.metrics.values()])
    for tensor_ in (x, *layer.parameters()):
        assert tensor_.grad is not None
        assert tensor_.grad.abs().max() == 0


def test_empty_experts_get_zero_gradients_and_the_others_theirs():
    layer = make(top_k=1)
    layer.router.weight.data.zero_()
    layer.router.weight.data[2, 0] = 1.0
    x_TD = torch.rand(7, 6, dtype=torch.float64) + 0.5  # feature 0 is positive: all go to expert 2
    y_TD, record = layer(x_TD)
    y_TD.square().sum().backward()
    assert record.tokens_E.tolist() == [0, 0, 7, 0]
    for parameter in layer.experts.parameters():
        assert parameter.grad[[0, 1, 3]].abs().max() == 0
        assert parameter.grad[2].abs().max() > 0


def test_the_losses_carry_their_coefficients():
    x_TD = torch.randn(9, 6, dtype=torch.float64)
    _, one = make(load_balance_coef=1.0, router_z_coef=1.0)(x_TD)
    _, few = make(load_balance_coef=0.5, router_z_coef=0.0)(x_TD)
    assert few.losses["load_balance"].item() == pytest.approx(one.losses["load_balance"].item() / 2)
    assert few.losses["router_z"].item() == 0


def test_bf16_under_autocast_keeps_float32_losses():
    layer = make().float()
    x_TD = torch.randn(9, 6, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_TD, record = layer(x_TD)
    (y_TD.float().square().sum() + sum(record.losses.values())).backward()
    assert y_TD.dtype == torch.bfloat16
    assert all(loss.dtype == torch.float32 for loss in record.losses.values())
    reference, _ = layer(x_TD)
    torch.testing.assert_close(y_TD.float(), reference, rtol=5e-2, atol=5e-2)


def test_moe_layers_names_them_in_order():
    model = nn.Sequential(nn.Linear(6, 6), make(), nn.ModuleDict({"b": make()}))
    assert list(moe_layers(model)) == ["1", "2.b"]
