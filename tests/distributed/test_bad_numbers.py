"""Numbers gone bad on one rank: the step is skipped on all, and nothing of the model moves."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.harness import run_distributed
from tests.distributed.poison import NAN, status_of_poisoned, train_poisoned
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


def test_a_nan_in_one_ranks_loss_and_an_outlier_that_is_a_spike(tmp_path):
    for name, value, reason in (
        ("nan", NAN, "loss and gradient norm not finite"),
        ("inf", float("inf"), "loss and gradient norm not finite"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        poison = {"kind": "loss", "rank": 1, "steps": [BAD], "value": value}
        cell = ("zero2", "fp32", 2, 2)
        said = run(folder, [cell], poison, 2)[cell]
        assert said["reason"] == reason
        assert isinstance(said["losses"][0], float)
        assert said["losses"][1] == name


def test_a_finite_outlier_is_skipped_where_that_is_asked_for(tmp_path):
    argv = command(tmp_path, "run", "zero2", "fp32", 2, 1)
    argv += ["--skip_spikes", "6", "--max_grad_norm", "0"]
    before = [1.0, 3.0] * 32  # median 2, spread 1.4826, and four more values
    poison = {"kind": "loss", "rank": 0, "steps": [BAD], "value": 1e9, "before": before}
    result = run_distributed(train_poisoned, 2, [argv], poison, timeout_s=600)[0][0]
    said = check(tmp_path / "run", result)
    assert column(result, "loss")[BAD - 1] > 1e8  # the log hides nothing
    assert said["reason"].startswith("spike: loss ")
    assert " and gradient norm " in said["reason"]
    assert said["gradients"] == []
    done = json.loads((tmp_path / "run" / f"checkpoint-{STEPS}" / "progress.json").read_text())
    assert [len(values) for values in done["guard"]["windows"].values()] == [64 + STEPS] * 2


def test_the_run_stops_after_so_many_in_a_row_and_not_by_as_many_apart(tmp_path):
    poison = {"kind": "expert", "rank": 0, "steps": [1, 2, 4, 5, 6], "value": NAN}
    argv = command(tmp_path, "run", "zero2", "fp32", 2, 1)
    argv += ["--max_bad_steps", "3", "--max_steps", "9"]
    found = run_distributed(status_of_poisoned, 2, argv, poison, timeout_s=300)
    assert [status for status, _ in found] == [16, 16]
    assert "3 steps in a row were skipped, the last is 6: gradient norm not finite" in found[0][1]
    report = json.loads((tmp_path / "run" / "bad_numbers.json").read_text())
    assert (report["skipped"], report["in_a_row"]) == (5, 3)
    assert [step["step"] for step in report["steps"]] == [1, 2, 4, 5, 6]
    saved = load_file(tmp_path / "run" / "checkpoint-1" / "optimizer.safetensors")
    assert not any(value.any() for name, value in saved.items() if name.startswith("exp_avg"))


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("config", CONFIGS)
def test_every_combination(tmp_path, config, world_size):
    cells = [
        (config, precision, ep_size, accumulation)
        for precision in (("fp32",) if config == "zero0" else ("fp32", "bf16"))
        for ep_size in (1, 2, 4)
        for accumulation in (1, 2)
        if ep_size <= world_size and accumulation * world_size <= 4
    ]
    for kind, value in (("expert", NAN), ("loss", float("inf"))):
        folder = tmp_path / kind
        folder.mkdir()
        poison = {"kind": kind, "rank": world_size - 1, "steps": [BAD], "value": value}
        assert run(folder, cells, poison, world_size).keys() == set(cells)
