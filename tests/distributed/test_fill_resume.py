"""Runs whose fill borrows from training rows go on from a checkpoint with the same bits."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.harness import run_distributed
from tests.distributed.runs import column, train_here, write_recipe

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
STEPS, SAVED = 6, 2
WARM_UP = 4  # ends behind the checkpoint
RECIPE = f"""\
# A run of seconds whose draws, dropout and noise of routers all have to go on.
dataset: tests.clinical_data:ClinicalData
missing_type: any
missing_ratio: 0.5
modality_dropout: 0.3
backbone: clinical
pretrained: none
backbone_config: {{num_tokens: 2, token_width: 16, num_heads: 2, num_blocks: 1}}
fusion: transformer
fusion_config: {{num_heads: 2, dropout: 0.2}}
objective: cox
prompt: none
moe_enable: false
max_steps: {STEPS}
global_batch_size: 16
learning_rate: 3.0e-3
lr_scheduler_type: cosine
logging_steps: 1
save_steps: {SAVED}
final_evaluation: false
"""
FILLS = {
    "retriever": {"num_heads": 2, "segments": True, "around_default": True},
    "similar_retriever": {"num_heads": 2, "num_supports": 4},
}


def test_resumed_weights_and_losses_are_those_of_one_run(tmp_path):
    words = ["--config", write_recipe(tmp_path, RECIPE)]
    cases = [(fill, warm_up) for fill in FILLS for warm_up in (0, WARM_UP)]
    folders, commands = {}, []
    for fill, warm_up in cases:
        config = json.dumps({**FILLS[fill], "warm_up_steps": warm_up})
        whole, parted = (tmp_path / f"{fill}-{warm_up}-{name}" for name in ("whole", "parted"))
        more = ["--fill", fill, "--fill_config", config]
        commands.append([*words, *more, "--output_dir", str(whole)])
        point = ["--resume_from_checkpoint", str(whole / f"checkpoint-{SAVED}")]
        commands.append([*words, *more, "--output_dir", str(parted), *point])
        folders[fill, warm_up] = whole, parted
    results = iter(run_distributed(train_here, 1, commands, timeout_s=400)[0])
    ends = {}
    for case, pair in folders.items():
        losses = [column(next(results), "loss") for _ in pair]
        assert len(losses[0]) == STEPS
        assert losses[0][SAVED:] == losses[1], case
        one, other = (load_file(folder / "final" / "model.safetensors") for folder in pair)
        assert one.keys() == other.keys()
        assert [name for name in one if not torch.equal(one[name], other[name])] == [], case
        assert any("fill." in name for name in one)
        ends[case] = losses[0]
    assert all(ends[fill, 0] != ends[fill, WARM_UP] for fill in FILLS)
    assert len({tuple(losses) for losses in ends.values()}) == 4
