"""Parameter groups of a model small enough to sort by hand."""

import pytest
import torch
from torch import nn

from mm_moe.moe.layer import MoELayer
from mm_moe.moe.settings import MoESettings
from mm_moe.training.optimizer import parameter_groups

DENSE_DECAYED = ["inner.weight", "sparse.router.weight"]
DENSE_PLAIN = ["inner.bias", "scale"]
EXPERT_DECAYED = ["sparse.experts.w_in", "sparse.experts.w_out"]
EXPERT_PLAIN = ["sparse.experts.b_in", "sparse.experts.b_out"]


def tagged_model() -> nn.Module:
    """A linear layer, a vector and a sparse layer whose experts carry DeepSpeed's tags."""
    model = nn.Module()
    model.inner = nn.Linear(4, 4)
    model.scale = nn.Parameter(torch.zeros(3))
    model.sparse = MoELayer(width=4, hidden=8, settings=MoESettings(num_experts=2))
    for parameter in model.sparse.experts.parameters():
        parameter.allreduce, parameter.group_name = False, "ep_size_2"
    return model


def sorted_groups(model, **options) -> list[tuple]:
    """(names, is expert, decay, rate) of each group."""
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = parameter_groups(model, weight_decay=0.1, learning_rate=2e-3, **options)
    return sorted(
        (
            sorted(name_of[id(parameter)] for parameter in group["params"]),
            group.get("moe", False),
            group["weight_decay"],
            group["lr"],
        )
        for group in groups
    )


def test_decay_times_dense_or_expert():
    assert sorted_groups(tagged_model()) == [
        (DENSE_PLAIN, False, 0.0, 2e-3),
        (DENSE_DECAYED, False, 0.1, 2e-3),
        (EXPERT_PLAIN, True, 0.0, 2e-3),
        (EXPERT_DECAYED, True, 0.1, 2e-3),
    ]


def test_expert_groups_carry_the_name_of_their_process_group():
    groups = parameter_groups(tagged_model(), weight_decay=0.1, learning_rate=1.0)
    assert [group["name"] for group in groups if group.get("moe")] == ["ep_size_2"] * 2
    dense = [group["name"] for group in groups if not group.get("moe")]
    assert len(set(dense)) == 2
    assert "ep_size_2" not in dense


def test_without_tags_a_stack_of_biases_is_a_matrix():
    model = tagged_model()
    for parameter in model.sparse.experts.parameters():
        del parameter.allreduce
    decayed = next(names for names, _, decay, _ in sorted_groups(model) if decay)
    assert decayed == sorted(DENSE_DECAYED + EXPERT_DECAYED + EXPERT_PLAIN)


def test_frozen_parameters_are_in_no_group_and_no_group_is_empty():
    model = tagged_model()
    model.sparse.experts.requires_grad_(False)
    model.scale.requires_grad_(False)
    model.inner.bias.requires_grad_(False)
    assert sorted_groups(model) == [(DENSE_DECAYED, False, 0.1, 2e-3)]


def test_a_scaled_rate_makes_its_own_group():
    found = sorted_groups(tagged_model(), scale=lambda name: 3.0 if name == "scale" else 1.0)
    assert (["scale"], False, 0.0, pytest.approx(6e-3)) in found
    assert (["inner.bias"], False, 0.0, 2e-3) in found
    assert len(found) == 5
