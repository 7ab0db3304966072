"""Whole contrastive runs: GradCache and every way to compute a loss follow one curve.

The samples of a step are the same, however they are split over processes and micro-batches. The
routers' auxiliary losses are off: theirs are the micro-batch's (see `GradCache`).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.distributed.harness import run_distributed
from tests.distributed.runs import column, train_here, write_recipe

pytestmark = pytest.mark.distributed

RECIPE = """\
dataset: emoji
missing_type: both
missing_ratio: 0.4
objective: contrastive
backbone: small_clip
pretrained: none
backbone_config: {patch_size: 16, num_blocks: 2, width: 32, num_heads: 2, hidden: 64}
moe_layers_idx: [1]
num_experts: 4
router_aux_loss_coef: 0.0
router_z_loss_coef: 0.0
max_steps: 3
global_batch_size: 16
shuffle_buffer: 100
learning_rate: 0.1
optim: sgd
max_grad_norm: 0.5
logging_steps: 1
save_strategy: "no"
"""
CACHE = ("--gradient_accumulation_steps", "2", "--grad_cache", "true")


def command(folder: Path, name: str, *more: str, stage: int = 2) -> list[str]:
    return [
        *("--config", write_recipe(folder, RECIPE), "--output_dir", str(folder / name)),
        *("--deepspeed", f"ds_configs/zero{stage}.json", *more),
    ]


def run_all(folder: Path, world_size: int, commands: dict[str, list[str]]):
    """Name -> (loss of each step, final weights)."""
    results = run_distributed(train_here, world_size, list(commands.values()), timeout_s=480)[0]
    return {
        name: (
            column(result, "loss/contrastive"),
            load_file(folder / name / "final" / "model.safetensors"),
        )
        for name, result in zip(commands, results, strict=True)
    }


def check_same(found, names, *, base: str, least: float = 0.5) -> None:
    losses, weights = found[base]
    assert len(losses) == 3
    assert min(losses) >= least
    for name in names:
        assert found[name][0] == pytest.approx(losses, abs=1e-5), name
        for key, value in weights.items():
            assert (found[name][1][key] - value).abs().max() <= 1e-6, (name, key)


def test_the_cache_follows_the_big_batch_with_spread_experts(tmp_path):
    commands = {
        "big": command(tmp_path, "big", "--ep_size", "2"),
        "cached": command(tmp_path, "cached", "--ep_size", "2", *CACHE),
    }
    check_same(run_all(tmp_path, 2, commands), ["cached"], base="big")


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["contrastive", "siglip"])
def test_every_stage_and_variant_follows_the_big_batch(tmp_path, objective):
    kind = ("--objective", objective)
    commands = {"big": command(tmp_path, "big", *kind)}
    for stage in (0, 1, 2):
        commands[f"cached{stage}"] = command(tmp_path, f"cached{stage}", *kind, *CACHE, stage=stage)
    for variant in ("chunked", "ring"):
        config = ("--objective_config", f'{{"variant": "{variant}", "chunk": 3}}')
        commands[variant] = command(tmp_path, variant, *kind, *config)
        commands[f"{variant}_cached"] = command(
            tmp_path, f"{variant}_cached", *kind, *config, *CACHE, "--activation_checkpointing"
        )
    found = run_all(tmp_path, 2, commands)
    check_same(found, [name for name in commands if name != "big"], base="big")


@pytest.mark.slow
def test_one_tower_with_its_entropies_is_the_same_on_two_ranks(tmp_path):
    """Both modalities through the same spread experts; ranks lack images or texts now and then."""
    shape = {"patch_size": 16, "num_blocks": 2, "width": 32, "num_heads": 2, "hidden": 64}
    moe = {"global_entropy_coef": 0.04, "by_modality": {"text": {"local_entropy_coef": 0.04}}}
    more = ["--backbone_config", json.dumps({**shape, "one_tower": True})]
    more += ["--moe_config", json.dumps(moe), "--global_batch_size", "4"]
    more += ["--missing_ratio", "0.8"]
    commands = {"two": command(tmp_path, "two", *more, "--ep_size", "2", "--max_grad_norm", "0.1")}
    found = run_all(tmp_path, 2, commands)
    alone = {"one": command(tmp_path, "one", *more, "--max_grad_norm", "0.1")}
    found |= run_all(tmp_path, 1, alone)
    check_same(found, ["two"], base="one", least=0.0)


@pytest.mark.slow
def test_one_process_follows_four(tmp_path):
    commands = {"four": command(tmp_path, "four", *CACHE, "--ep_size", "2")}
    found = run_all(tmp_path, 4, commands)
    found |= run_all(tmp_path, 1, {"one": command(tmp_path, "one")})
    check_same(found, ["four"], base="one")
