"""Numbers gone bad on one rank: the step is skipped on all, and nothing of the model moves."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.harness import run_distributed
from tests.distributed.poison import NAN, train_poisoned
from tests.distributed.runs import column, write_recipe

pytestmark = [pytest.mark.distributed, pytest.mark.faults]
STEPS, BAD = 4, 3
CONFIGS = ("zero0", "zero1", "zero2", "zero2_offload")


def command(folder, name, config, precision, ep_size, accumulation):
    return [
        *("--config", write_recipe(folder), "--output_dir", str(folder / name)),
        *("--deepspeed", f"ds_configs/{config}.json", "--ep_size", str(ep_size)),
        *("--gradient_accumulation_steps", str(accumulation), "--max_steps", str(STEPS)),
        *("--bf16", str(precision == "bf16").lower(), "--save_steps", "1"),
        *("--moe_config", '{"bias_update_rate": 0.01}', "--final_evaluation", "false"),
    ]


def check(folder, result):
    """One bad step: equal bits before and after it, movement around it, and the log says so."""
    before, bad, after = (folder / f"checkpoint-{step}" for step in (BAD - 1, BAD, BAD + 1))
    for file in ("model.safetensors", "optimizer.safetensors"):
        old, same, new = (load_file(place / file) for place in (before, bad, after))
        assert all(torch.equal(old[name], same[name]) for name in old), file
        assert any(not torch.equal(old[name], new[name]) for name in old), file
        assert all(bool(value.isfinite().all()) for value in new.values()), file
    done = [json.loads((place / "progress.json").read_text()) for place in (before, bad, after)]
    assert [entry["optimizer_step"] for entry in done] == [BAD - 1, BAD - 1, BAD]
    assert [entry["guard"]["skipped"] for entry in done] == [0, 1, 1]
    assert column(result, "train/skipped_steps") == [0, 0, 1, 1]
    rates = column(result, "learning_rate")
    assert len(set(rates)) == STEPS  # the schedule goes on
    assert [isinstance(loss, float) for loss in column(result, "loss")][BAD:] == [True]
    report = json.loads((folder / "bad_numbers.json").read_text())
    assert [step["step"] for step in report["steps"]] == [BAD]
    return report["steps"][0]


def run(tmp_path, cells, poison, world_size):
    commands = [command(tmp_path, "-".join(map(str, cell)), *cell) for cell in cells]
    ranks = run_distributed(train_poisoned, world_size, commands, poison, timeout_s=600)
    return {
        cell: check(tmp_path / "-".join(map(str, cell)), result)
        for cell, result in zip(cells, ranks[0], strict=True)
    }


def test_a_nan_in_one_ranks_one_expert(tmp_path):
    cells = [
        ("zero0", "fp32", 2, 1),
        ("zero1", "bf16", 2, 2),
        ("zero2", "fp32", 1, 2),
        ("zero2", "bf16", 1, 1),
        ("zero2_offload", "fp32", 2, 1),
    ]
    poison = {"kind": "expert", "rank": 1, "steps": [BAD], "value": NAN}
    for cell, said in run(tmp_path, cells, poison, 2).items():
        assert said["reason"] == "gradient norm not finite", cell
        assert said["gradients"][0].endswith("of expert 3"), cell
        assert len(said["gradients"]) == 1, cell
        assert [len(ids) for ids in said["ids"]] == [2, 2], cell
