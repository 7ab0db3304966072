"""DeepSpeed's own `save_checkpoint` and `load_checkpoint` on a model with our expert layers.

A fresh engine that loads what another saved goes on with bit-equal losses, and the folder holds one
file for each expert of each layer. ZeRO 0, 1 and 2 on 2 and 4 processes, every expert-parallel
size.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from eval.benchmarks.parity_loops import EXPERTS, SAMPLES, batches, build
from tests.distributed.harness import run_distributed

pytestmark = pytest.mark.distributed

BEFORE, AFTER = 2, 3
LAYOUTS = [*itertools.product((1, 2), (1, 2, 4)), (0, 2)]  # ZeRO stage, expert-parallel size


def new_engine(stage: int, ep_size: int, world_size: int):
    """A fresh engine over a fresh model."""
    import deepspeed

    from mm_moe.moe.parallel import make_expert_parallel
    from mm_moe.training.optimizer import parameter_groups

    model = make_expert_parallel(build(2), ep_size=ep_size)
    groups = parameter_groups(model, weight_decay=0.01, learning_rate=1e-2)
    config = {
        "train_micro_batch_size_per_gpu": SAMPLES // world_size,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.AdamW(groups)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    assert engine.has_moe_layers
    assert engine.num_experts == [EXPERTS, EXPERTS]
    return engine


def train(engine, data, rank: int, world_size: int) -> list[float]:
    part = slice(rank * SAMPLES // world_size, (rank + 1) * SAMPLES // world_size)
    losses = []
    for batch in data:
        loss, _ = engine(*(tensor[part] for tensor in batch))
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / world_size)
    return losses


def save_and_go_on(rank, world_size, folder):
    """For each layout: the losses after saving, and those of an engine that loaded the folder."""
    data = list(itertools.islice(batches(), BEFORE + AFTER))
    found = {}
    for stage, ep_size in LAYOUTS:
        if world_size % ep_size:
            continue
        path = f"{folder}/{stage}-{ep_size}"
        first = new_engine(stage, ep_size, world_size)
        train(first, data[:BEFORE], rank, world_size)
        first.save_checkpoint(path, tag="now")
        expected = train(first, data[BEFORE:], rank, world_size)
        torch.manual_seed(99)
        second = new_engine(stage, ep_size, world_size)
        with torch.no_grad():
            for parameter in second.module.parameters():
                parameter.zero_()
        loaded, _ = second.load_checkpoint(path, tag="now")
        assert loaded is not None
        found[stage, ep_size] = expected, train(second, data[BEFORE:], rank, world_size)
    return found


@pytest.fixture(scope="module", params=[2, 4], ids="{} processes".format)
def results(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepspeed")
    return folder, run_distributed(save_and_go_on, request.param, str(folder))


def test_training_goes_on_bit_for_bit(results):
    _, ranks = results
    for found in ranks:
        assert len(found) in (5, 7)  # on 2 and on 4 processes
        assert {layout: after for layout, (_, after) in found.items()} == {
            layout: expected for layout, (expected, _) in found.items()
        }
        assert all(len(set(expected)) == AFTER for expected, _ in found.values())


def test_each_expert_has_one_file(results):
    folder, ranks = results
    wanted = {(layer, expert) for layer in range(2) for expert in range(EXPERTS)}
    for stage, ep_size in ranks[0]:
        files = list(Path(folder, f"{stage}-{ep_size}", "now").glob("layer_*_expert_*"))
        names = [file.name.split("_") for file in files]
        assert sorted((int(name[1]), int(name[3])) for name in names) == sorted(wanted)
        for file, (_, layer, _, expert, *_) in zip(files, names, strict=True):
            module = ("first", "second")[int(layer)]
            prefix = f"{module}.deepspeed_moe.experts.deepspeed_experts.{expert}."
            held = torch.load(file, weights_only=True)
            assert {key.removeprefix(prefix) for key in held} == {"w_in", "b_in", "w_out", "b_out"}
            assert held[prefix + "w_in"].ndim == 2


def one_layer(rank, world_size):
    """What a layer's state is called alone and in its model, whether both load, and a refusal."""
    from mm_moe.moe.parallel import make_expert_parallel

    model = make_expert_parallel(build(1), ep_size=world_size)
    layer = model.first
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    alone, whole = layer.state_dict(), model.state_dict()
    came_back = []
    for module, state in ((layer, alone), (model, whole)):
        kept = {key: value.clone() for key, value in state.items()}
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.zero_()
        module.load_state_dict(kept)
        came_back.append(all(map(torch.equal, layer.parameters(), before)))
    del alone["deepspeed_moe.experts.deepspeed_experts.1.b_in"]
    with pytest.raises(RuntimeError, match=r"experts\.b_in"):
        layer.load_state_dict(alone)
    return sorted(layer.state_dict()), sorted(whole), came_back


def test_a_layer_alone_names_its_experts_one_by_one_and_loads_both():
    names = ("w_in", "b_in", "w_out", "b_out")
    for alone, whole, came_back in run_distributed(one_layer, 2):
        prefix = "deepspeed_moe.experts.deepspeed_experts."
        experts = [f"{prefix}{i}.{name}" for i in range(EXPERTS // 2) for name in names]
        assert alone == sorted([*experts, "router.weight"])
        assert {f"first.experts.{name}" for name in names} < set(whole)
        assert not any(prefix in name for name in whole)
        assert came_back == [True, True]
