"""BLIP-2's first stage over 2 and 4 ranks equals one process with the whole batch, in float64.

Loss, every part of it and all gradients, averaged over ranks as DeepSpeed does; the pairs are
uneven and some rank has none. With experts spread over ranks, and with each rank holding all.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from pretrain.blip2 import Blip2StageOne
from tests.blip2_rows import FULL, PRESENT, ROWS, batch_of, stage_one_model
from tests.distributed.harness import run_distributed

pytestmark = pytest.mark.distributed
NONE = [(0, 1)] * ROWS
CASES = {
    "dense": (None, PRESENT),
    "full": (None, FULL),
    "none": (None, NONE),
    "sparse": ({"num_experts": 4, "top_k": 2}, PRESENT),
    "by modality": ({"num_experts": 4, "router": "by_modality"}, FULL),
}


def step(model, part: slice, present) -> dict[str, torch.Tensor]:
    """The parts of the loss and the gradients by name."""
    loss, parts, _ = Blip2StageOne()(model, batch_of(part, present=present))
    loss.backward()
    found = {name: value.detach().clone() for name, value in parts.items()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad
    return found


def means_over_ranks(rank: int, world_size: int, ep_size: int):
    """Every case on this rank's rows; experts' gradients of all experts."""
    from mm_moe.moe.layer import moe_layers
    from mm_moe.moe.parallel import gather_experts, make_expert_parallel
    from mm_moe.moe.parallel_state import is_expert_parameter

    size = ROWS // world_size
    part = slice(rank * size, (rank + 1) * size)
    results = {}
    for case, (moe, present) in CASES.items():
        model = stage_one_model(moe=moe)
        make_expert_parallel(model, ep_size=ep_size)
        found = step(model, part, present)
        owners = {f"{name}.": layer for name, layer in moe_layers(model).items()}
        parameters = dict(model.named_parameters())
        for name, value in found.items():
            scale = world_size
            if name in parameters and is_expert_parameter(parameters[name]):
                owner = next(owners[start] for start in owners if name.startswith(start))
                value = gather_experts(value, owner)  # the sum over the ranks of a group
                scale *= ep_size  # which all of them hold now
            value = value.contiguous()
            dist.all_reduce(value)
            found[name] = value / scale
        results[case] = found
    return results


@pytest.mark.parametrize(("world_size", "ep_size"), [(2, 1), (2, 2), (4, 2)])
def test_ranks_equal_one_process_with_all_rows(world_size, ep_size):
    found = run_distributed(means_over_ranks, world_size, ep_size, timeout_s=480)[0]
    for case, (moe, present) in CASES.items():
        whole = step(stage_one_model(moe=moe), slice(None), present)
        assert found[case].keys() == whole.keys()
        for name, value in whole.items():
            assert (found[case][name] - value).abs().max() <= 1e-10, (case, name)


def test_the_cases_mean_something():
    full, none = (step(stage_one_model(), slice(None), rows) for rows in (FULL, NONE))
    assert min(full[name] for name in ("itc", "itm", "itg")) > 0.3
    assert not any(value.abs().max() for value in none.values())
    still = [name for name, value in full.items() if not value.abs().max() > 1e-8]
    # a bias of keys moves all scores of a query alike
    assert all(".key.bias" in name for name in still), still
