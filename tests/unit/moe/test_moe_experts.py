"""Experts on sorted rows against one dense feed-forward after the other."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mm_moe.errors import ConfigError
from mm_moe.moe.companion import FeedForward
from mm_moe.moe.experts import ACTIVATIONS, Experts, grouped_feed_forward


def make(num_experts=3, width=4, hidden=5, activation="gelu", dtype=torch.float64):
    torch.manual_seed(0)
    experts = Experts(num_experts=num_experts, width=width, hidden=hidden, activation=activation)
    for bias in (experts.b_in, experts.b_out):
        nn.init.normal_(bias)
    return experts.to(dtype)


def dense(experts, x_RD, rows):
    """The same function with plain autograd: one expert after the other."""
    activation = ACTIVATIONS[experts.activation].forward
    outputs = []
    for e, piece in enumerate(x_RD.split(rows)):
        hidden = activation(piece @ experts.w_in[e] + experts.b_in[e])
        outputs.append(hidden @ experts.w_out[e] + experts.b_out[e])
    return torch.cat(outputs)


def test_one_row_by_hand():
    experts = Experts(num_experts=2, width=1, hidden=1, activation="quick_gelu")
    for name, value in {"w_in": [2, 5], "b_in": [1, 5], "w_out": [3, 5], "b_out": [4, 5]}.items():
        parameter = getattr(experts, name)
        parameter.data = torch.tensor(value).float().view_as(parameter)
    y = experts(torch.tensor([[1.0]]), torch.tensor([1, 0])).item()
    # h = 2 * 1 + 1 = 3; quick gelu 3 * sigmoid(5.106) = 2.98194; 2.98194 * 3 + 4
    assert y == pytest.approx(12.94582, abs=1e-4)


def test_one_gated_row_by_hand():
    experts = Experts(num_experts=1, width=1, hidden=2, activation="silu_gated")
    # columns: gate of units 0 and 1, then what they multiply
    experts.w_in.data = torch.tensor([[[1.0, -1.0, 3.0, 5.0]]])
    experts.b_in.data = torch.tensor([[0.0, 0.0, 1.0, 0.0]])
    experts.w_out.data = torch.tensor([[[1.0], [2.0]]])
    y = experts(torch.tensor([[2.0]]), torch.tensor([1])).item()
    # silu(2) = 1.761594, silu(-2) = -0.238406; 1.761594 * (6 + 1) * 1 - 0.238406 * 10 * 2
    assert y == pytest.approx(7.56304, abs=1e-4)


def test_a_dense_feed_forward_has_the_layout_of_an_expert():
    experts = make(num_experts=1, activation="gelu_gated")
    beside = FeedForward(width=4, hidden=5, activation="gelu_gated").double()
    beside.fc1.weight.data, beside.fc1.bias.data = experts.w_in[0].t(), experts.b_in[0]
    beside.fc2.weight.data, beside.fc2.bias.data = experts.w_out[0].t(), experts.b_out[0]
    x_RD = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(beside(x_RD), experts(x_RD, torch.tensor([3])))


REFERENCE = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
}


@pytest.mark.parametrize("name", REFERENCE)
def test_activations_are_what_their_names_say(name):
    x, y = torch.randn(7, 3).double(), torch.randn(7, 3).double()
    torch.testing.assert_close(ACTIVATIONS[name].forward(x), REFERENCE[name](x))
    gated = ACTIVATIONS[f"{name}_gated"].forward(torch.cat([x, y], -1))
    torch.testing.assert_close(gated, REFERENCE[name](x) * y)
    assert 2 * len(REFERENCE) == len(ACTIVATIONS)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [[2, 3, 1], [0, 6, 0], [6, 0, 0], [0, 0, 0]], ids=str)
def test_values_and_gradients_equal_plain_autograd(activation, rows):
    experts = make(activation=activation)
    x_RD = torch.randn(sum(rows), 4, dtype=torch.float64, requires_grad=True)
    seed_RD = torch.randn_like(x_RD)
    wanted = [x_RD, *experts.parameters()]
    y_RD, reference = experts(x_RD, torch.tensor(rows)), dense(experts, x_RD, rows)
    torch.testing.assert_close(y_RD, reference, rtol=1e-12, atol=1e-12)
    ours = torch.autograd.grad((y_RD * seed_RD).sum(), wanted)
    theirs = torch.autograd.grad((reference * seed_RD).sum(), wanted)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    experts = make(width=3, hidden=4, activation=activation)
    x_RD = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    names, values = zip(*experts.named_parameters(), strict=True)

    def run(x_RD, *values):
        state = dict(zip(names, values, strict=True))
        return torch.func.functional_call(experts, state, (x_RD, torch.tensor([2, 0, 3])))

    assert torch.autograd.gradcheck(run, (x_RD, *values))


def test_frozen_experts_still_pass_gradients_to_their_inputs():
    experts = make().requires_grad_(False)
    x_RD = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    experts(x_RD, torch.tensor([1, 3, 0])).sum().backward()
    assert x_RD.grad.abs().min() > 0
    assert experts.w_in.grad is None


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
@pytest.mark.parametrize("rows", [[16, 8, 24], [0, 48, 0], [17, 0, 5]], ids=str)
@pytest.mark.parametrize("activation", ["gelu", "silu_gated"])
def test_grouped_products_equal_slices(activation, rows):
    experts = make(width=16, hidden=32, activation=activation, dtype=torch.bfloat16)
    x_RD = torch.randn(sum(rows), 16, dtype=torch.bfloat16, requires_grad=True)
    weights = (experts.w_in, experts.b_in, experts.w_out, experts.b_out)
    activation = ACTIVATIONS[experts.activation]
    rows_E = torch.tensor(rows)
    grouped = grouped_feed_forward(x_RD, *weights, rows_E=rows_E, activation=activation)
    sliced = experts(x_RD, rows_E)
    torch.testing.assert_close(grouped, sliced, rtol=2e-2, atol=5e-2)
    theirs = torch.autograd.grad(grouped.float().square().sum(), [x_RD, *weights])
    ours = torch.autograd.grad(sliced.float().square().sum(), [x_RD, *weights])
    for ours_g, theirs_g in zip(ours, theirs, strict=True):
        scale = theirs_g.float().abs().max()
        assert (ours_g.float() - theirs_g.float()).abs().max() <= 0.03 * scale


@pytest.mark.parametrize("activation", ["gelu", "silu_gated"])
def test_slice_copies_values_and_trainability(activation):
    experts = make(activation=activation)
    experts.b_out.requires_grad_(False)
    part = experts.slice(1, 3)
    for name, parameter in part.named_parameters():
        whole = getattr(experts, name)
        assert torch.equal(parameter, whole[1:3])
        assert parameter.requires_grad == whole.requires_grad
    assert [name for name, _ in part.named_parameters()] == [
        name for name, _ in experts.named_parameters()
    ]


def test_an_unknown_activation_names_the_nearest():
    with pytest.raises(ConfigError, match="quick_gelu"):
        Experts(num_experts=1, width=1, hidden=1, activation="quickgelu")
