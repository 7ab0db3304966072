"""What a model looks like after its experts were spread over processes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from tests.distributed.harness import run_distributed

pytestmark = pytest.mark.distributed


def build() -> nn.Module:
    from mm_moe.moe.layer import MoELayer
    from mm_moe.moe.settings import MoESettings

    torch.manual_seed(0)
    settings = MoESettings(num_experts=4, num_shared_experts=1)
    model = nn.ModuleDict({"a": MoELayer(width=4, hidden=6, settings=settings)})
    model["b"] = nn.Sequential(nn.Linear(4, 4), MoELayer(width=4, hidden=6, settings=settings))
    model["a"].experts.b_out.requires_grad_(False)
    return model.eval()


def inspect(rank, world_size):
    from deepspeed.moe.layer import MoE

    from mm_moe.errors import ParallelismError
    from mm_moe.moe.layer import moe_layers
    from mm_moe.moe.parallel import (
        gather_experts,
        is_expert_parameter,
        make_expert_parallel,
        slice_experts,
    )

    whole = build()
    model = make_expert_parallel(copy.deepcopy(whole), ep_size=2)
    layers = moe_layers(model)
    facts = {
        "keys": list(model.state_dict()) == list(whole.state_dict()),
        "seen by deepspeed": all(isinstance(layer, MoE) for layer in layers.values()),
        "mode kept": not any(module.training for module in model.modules()),
        "first expert": layers["b.1"].first_expert,
        "experts": [name for name, entry in model.named_parameters() if is_expert_parameter(entry)],
        "group": model["a"].experts.w_in.group_name,
        "frozen kept": not model["a"].experts.b_out.requires_grad,
    }
    for name, layer in layers.items():
        original = whole.get_submodule(name).experts
        for key, part in layer.experts.named_parameters():
            facts[f"{name}.{key} slice"] = torch.equal(
                part, slice_experts(getattr(original, key), layer)
            )
            gathered = gather_experts(part.detach(), layer)
            facts[f"{name}.{key} gather"] = torch.equal(gathered, getattr(original, key))
    x_TD = torch.randn(3, 4)
    again = pickle.loads(pickle.dumps(copy.deepcopy(model["a"])))
    facts["copies work"] = torch.equal(again(x_TD)[0], model["a"](x_TD)[0])
    for wrong in (lambda: make_expert_parallel(model, ep_size=2), lambda: spread_strided(model)):
        try:
            wrong()
        except ParallelismError as error:
            facts.setdefault("refusals", []).append(str(error))
    return facts


def spread_strided(model):
    model["a"].set_deepspeed_parallelism(use_data_before_expert_parallel_=True)


@pytest.fixture(scope="module")
def ranks():
    return run_distributed(inspect, 2)


def test_every_rank_holds_its_experts_under_the_same_names(ranks):
    for rank, facts in enumerate(ranks):
        assert facts["first expert"] == 2 * rank
        assert all(value for key, value in facts.items() if key.endswith(("slice", "gather")))
        assert facts["keys"]
        assert facts["copies work"]


def test_deepspeed_finds_its_layer_and_tags(ranks):
    for facts in ranks:
        assert facts["seen by deepspeed"]
        assert facts["mode kept"]
        assert facts["frozen kept"]
        assert facts["group"] == "ep_size_2"
        names = [f"{layer}.experts" for layer in ("a", "b.1")]
        tensors = ["w_in", "b_in", "w_out", "b_out"]
        assert facts["experts"] == [f"{name}.{tensor}" for name in names for tensor in tensors]


def test_what_cannot_be_done_is_refused(ranks):
    twice, strided = ranks[0]["refusals"]
    assert "'a' is expert-parallel already" in twice
    assert "use_data_before_expert_parallel" in strided
