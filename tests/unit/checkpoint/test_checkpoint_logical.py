"""Weights of a model without process groups: out and in again, and what does not fit is named."""

import pytest
import torch
from torch import nn

from mm_moe.checkpoint.logical import full_weights, load_weights
from mm_moe.errors import CheckpointError
from mm_moe.moe.layer import MoELayer
from mm_moe.moe.parallel_state import LogicalTensor, logical_tensors, model_state
from mm_moe.moe.settings import MoESettings


def model_of(seed: int, *, num_experts: int = 3, width: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    sparse = MoELayer(width=width, hidden=8, settings=MoESettings(num_experts=num_experts))
    model = nn.Sequential(nn.Linear(width, width), sparse)
    model.register_buffer("seen", torch.tensor(seed))
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def test_every_tensor_comes_back_bit_for_bit():
    source, target = model_of(1), model_of(2)
    weights = full_weights(source)
    assert weights.keys() == source.state_dict().keys()
    assert weights["1.experts.w_in"].shape == (3, 4, 8)
    load_weights(target, weights.__getitem__)
    theirs = source.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in target.state_dict().items())
    assert target.seen == 1


def test_loading_copies_and_does_not_alias():
    source, target = model_of(1), model_of(2)
    load_weights(target, full_weights(source).__getitem__)
    with torch.no_grad():
        target[0].weight.add_(1.0)
    assert not torch.equal(source[0].weight, target[0].weight)
    assert all(parameter.requires_grad for parameter in target.parameters())


def test_the_weights_hold_no_graph_and_are_contiguous():
    model = model_of(1)
    model[0].weight = nn.Parameter(model[0].weight.detach().t())
    weights = full_weights(model)
    assert not any(value.requires_grad for value in weights.values())
    assert all(value.is_contiguous() for value in weights.values())
    assert torch.equal(weights["0.weight"], model[0].weight)


def test_no_tensor_of_a_plain_model_has_an_owner():
    model = model_of(1)
    tensors = list(logical_tensors(model, model_state(model)))
    assert [entry.owner for entry in tensors] == [None] * 8
    assert [entry.name for entry in tensors] == list(model.state_dict())


def test_an_expert_parameter_belongs_to_its_layer():
    model = model_of(1)
    model[1].experts.w_in.allreduce = False
    owners = {entry.name: entry.owner for entry in logical_tensors(model, model_state(model))}
    assert owners["1.experts.w_in"] is model[1]
    assert owners["1.experts.w_out"] is None


def test_single_experts_are_the_transposes_of_their_slices_of_the_stack():
    first, second = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), torch.zeros(2, 3)
    entry = LogicalTensor(name="w", parts=(first, second), owner=None, single=True)
    stack = entry.join(entry.parts)
    assert stack[0].tolist() == [[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]]
    assert all(map(torch.equal, entry.split(stack), entry.parts))


def test_an_absent_tensor_is_named():
    weights = full_weights(model_of(1))
    del weights["1.router.weight"]
    with pytest.raises(CheckpointError, match=r"'1\.router\.weight'"):
        load_weights(model_of(2), weights.__getitem__)


def test_another_number_of_experts_is_named_with_both_shapes():
    weights = full_weights(model_of(1, num_experts=3))
    with pytest.raises(CheckpointError, match=r"\(3, 4\), the model needs \(2, 4\)"):
        load_weights(model_of(2, num_experts=2), weights.__getitem__)
