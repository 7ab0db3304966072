"""LoRA through the whole program on two processes: only the adapters move, and a resume goes on."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from mm_moe.models import MultimodalMoEModel
from tests.distributed.harness import run_distributed
from tests.distributed.runs import RECIPE, column, train_here, write_recipe

pytestmark = pytest.mark.distributed


def test_adapters_train_alone_and_resume(tmp_path):
    recipe = write_recipe(tmp_path, RECIPE.replace("max_steps: 20", "max_steps: 6"))
    shared = [
        *("--config", recipe, "--deepspeed", "ds_configs/zero2.json", "--ep_size", "2"),
        *("--lora_r", "2", "--lora_dropout", "0.1", "--unlock_blocks", "1", "--save_steps", "3"),
        *("--final_evaluation", "false", "--prompt", "none"),
    ]
    whole, again = tmp_path / "whole", tmp_path / "again"
    resume = ("--resume_from_checkpoint", str(whole / "checkpoint-3"))
    commands = [
        [*shared, "--output_dir", str(whole)],
        [*shared, "--output_dir", str(again), *resume],
    ]
    first, second = run_distributed(train_here, 2, commands, timeout_s=300)[0]
    assert column(second, "loss") == column(first, "loss")[3:]

    before = load_file(whole / "checkpoint-3" / "model.safetensors")
    after = load_file(whole / "final" / "model.safetensors")
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert {name for name in after if ".lora_" in name} <= moved
    frozen = {name for name in after if ".layers.0." in name and ".base_layer." in name}
    assert frozen
    assert not frozen & moved
    assert any(".layers.1." in name and ".base_layer." in name for name in moved)  # unlocked
    model = MultimodalMoEModel.from_pretrained(whole / "final")
    assert all(torch.equal(t, after[name]) for name, t in model.state_dict().items())
