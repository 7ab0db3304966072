"""The planner's bytes of autoencoders are those that real training steps allocate."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from eval.benchmarks.memory_estimate import ROOT, measure
from launch import plan
from tests.distributed.harness import run_distributed

pytest.importorskip("anndata", reason="pip install -e '.[single_cell]'")
from tests.cell_files import counts, write_h5ad

GENES = {"human": 1500, "mouse": 700}
RECIPE = """\
# A run of seconds.
dataset: cells
dataset_options: {files: {human: human.h5ad, mouse: mouse.h5ad}, sampler: longest}
objective: mmvae
model_config: {expert_hidden: [64], expert_width: 32, core_hidden: [16], latent_size: 8}
objective_config: OBJECTIVE
prompt: none
moe_enable: false
max_steps: 2
final_evaluation: false
save_strategy: "no"
"""
PLAIN = "{}"
FULL = "{adversary_weight: 1.0, critic_weight: 1.0, cycle_weight: 0.1, latent_cycle_weight: 1.0}"


def measured_here(rank: int, world_size: int, flags: list[str]) -> int:
    found = measure(flags)
    sys.stdout.flush()
    return int(found["peak"])


def flags_of(folder: Path, objective: str, stage: str, ep_size: int) -> list[str]:
    for name, genes in GENES.items():
        write_h5ad(folder / f"{name}.h5ad", counts(160, genes))
    (folder / "recipe.yaml").write_text(RECIPE.replace("OBJECTIVE", objective))
    deepspeed = json.loads((ROOT / "ds_configs" / f"{stage}.json").read_text())
    deepspeed["zero_optimization"]["reduce_bucket_size"] = 100_000
    (folder / "deepspeed.json").write_text(json.dumps(deepspeed))
    words = ["--config", str(folder / "recipe.yaml"), "--data_dir", str(folder)]
    words += ["--deepspeed", str(folder / "deepspeed.json"), "--ep_size", str(ep_size)]
    return [*words, "--global_batch_size", "128"]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("objective", "stage", "processes"),
    [(PLAIN, "zero2", 1), (FULL, "zero2", 1), (FULL, "zero1", 2)],
)
def test_cells_are_within_15_percent(objective, stage, processes, tmp_path):
    flags, file = flags_of(tmp_path, objective, stage, processes), tmp_path / "plan.json"
    words = [*flags, "--output_dir", str(tmp_path / "run")]
    measured = max(run_distributed(measured_here, processes, words, timeout_s=500))
    plan.main(["--json", str(file), "--gpu", "cpu", "--world_size", str(processes), *flags])
    found = json.loads(file.read_text())
    own = found["memory"][found["own_stage"]]
    ratio = (own["device"] + own["host"]) / measured
    assert 0.85 <= ratio <= 1.15
