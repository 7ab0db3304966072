"""LoRA adapters of `peft` beside expert layers: parameter groups, training, checkpoint, resume.

The attention of both towers carries adapters, the dense weights are frozen, the sparse layers,
prompts and head are trained. Two processes (ep_size 2, ZeRO-2) equal one plain process.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from tests.distributed.harness import run_distributed
from tests.distributed.test_reshard import CLIP, EPS, MORE, SAMPLES, STEPS, Run, batch_of, build

pytestmark = pytest.mark.distributed


def adapted(seed: int):
    """A model whose query and value projections carry adapters, all else as in training."""
    import peft

    from mm_moe.moe.layer import moe_layers

    model = build(seed)
    model.freeze()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    for tower in model.backbone.towers.values():
        peft.inject_adapter_in_model(config, tower)  # freezes all else in the tower
        for layer in moe_layers(tower).values():
            layer.requires_grad_(True)
    return model


class AdaptedRun(Run):
    def model(self, seed: int):
        return adapted(seed)


def plain_losses() -> tuple[list[float], dict[str, torch.Tensor]]:
    """One process on whole batches, groups by a rule of our own; the schedule is that of `Run`."""
    model = adapted(1)
    groups = {0.05: [], 0.0: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            matrix = parameter.ndim - (".experts." in name) > 1
            groups[0.05 if matrix else 0.0].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": params, "weight_decay": decay} for decay, params in groups.items()],
        lr=3e-3,
        eps=EPS,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    losses = []
    for step in range(STEPS + MORE):
        batch = batch_of(step, slice(0, SAMPLES))
        output = model(**batch)
        loss = F.cross_entropy(output.logits, batch["labels"]) + sum(output.losses.values())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    return losses, model.state_dict()


def train(rank, world_size, folder):
    from mm_moe.checkpoint.logical import full_weights

    run = AdaptedRun(rank, world_size, ep_size=2, stage=2, seed=1)
    losses = run.train(range(STEPS))
    run.save(folder)
    wrong = run.differing(folder)
    losses += run.train(range(STEPS, STEPS + MORE))
    reference, theirs = plain_losses()
    ours = full_weights(run.engine.module)
    assert ours.keys() == theirs.keys()
    gap = max((ours[name] - value).abs().max().item() for name, value in theirs.items())
    moved = {
        name: not torch.equal(value, ours[name]) for name, value in adapted(1).state_dict().items()
    }
    return {"losses": losses, "reference": reference, "weights": gap, "moved": moved} | {
        "wrong": wrong
    }


def resume(rank, world_size, folder, ep_size, stage):
    run = AdaptedRun(rank, world_size, ep_size=ep_size, stage=stage, seed=2)
    run.restore(folder)
    return run.differing(folder), run.train(range(STEPS, STEPS + MORE))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("adapters"))
    return folder, run_distributed(train, 2, folder)


def test_two_processes_equal_one(trained):
    for rank in trained[1]:
        assert rank["losses"] == pytest.approx(rank["reference"], abs=1e-6)
        assert rank["weights"] <= 1e-5


def test_adapters_and_experts_move_and_the_frozen_stay(trained):
    moved = trained[1][0]["moved"]
    frozen = [name for name in moved if ".towers." in name and ".mlp." not in name]
    frozen = [name for name in frozen if name.startswith("backbone.") and "lora_" not in name]
    assert len([name for name in moved if "lora_" in name and moved[name]]) == 2 * 2 * 2 * 2
    assert any(moved[name] for name in moved if ".experts." in name)
    assert not any(moved[name] for name in frozen)
    assert len(frozen) > 20


@pytest.mark.parametrize(("world_size", "ep_size", "stage"), [(1, 1, 0), (2, 1, 1)])
def test_adapters_resume_at_another_layout(trained, world_size, ep_size, stage):
    folder, ranks = trained
    assert all(rank["wrong"] == [] for rank in ranks)
    assert Path(folder, f"checkpoint-{STEPS}").is_dir()
    for wrong, losses in run_distributed(resume, world_size, folder, ep_size, stage):
        assert wrong == []
        assert losses == pytest.approx(ranks[0]["losses"][STEPS:], abs=1e-6)


def groups(rank, world_size):
    """The groups' settings, and the names in each, at ep_size 2."""
    from mm_moe.moe.parallel import make_expert_parallel
    from mm_moe.training.optimizer import parameter_groups

    model = make_expert_parallel(adapted(1), ep_size=2)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    found = []
    for group in parameter_groups(model, weight_decay=0.05, learning_rate=1e-3):
        names = [name_of[id(parameter)] for parameter in group["params"]]
        found.append((group.get("moe", False), group["weight_decay"], names, group["name"]))
    return sorted(trainable), found


def test_every_trained_parameter_is_in_exactly_one_group():
    for trainable, found in run_distributed(groups, 2):
        assert sorted(name for *_, names, _ in found for name in names) == trainable
        kinds = {(moe, decay): names for moe, decay, names, _ in found}
        assert sorted(kinds) == [(False, 0.0), (False, 0.05), (True, 0.0), (True, 0.05)]
        assert {name.split(".")[-1] for name in kinds[True, 0.05]} == {"w_in", "w_out"}
        assert {name.split(".")[-1] for name in kinds[True, 0.0]} == {"b_in", "b_out"}
        lora = [name for name in trainable if "lora_" in name]
        assert len(lora) == 2 * 2 * 2 * 2  # towers, blocks, projections, A and B
        assert set(lora) < set(kinds[False, 0.05])
        assert all(group == "ep_size_2" for moe, *_, group in found if moe)
        assert not any("base_layer" in name for name in trainable)
