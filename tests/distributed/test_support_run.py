"""Runs whose fill borrows from training rows: the same on two processes, and scored again."""

import json

import pytest

from launch import evaluate_run, prepare_data
from launch.supports import FOLDER
from tests import patient_layouts
from tests.distributed.harness import run_distributed
from tests.distributed.runs import column, train_here, write_recipe

RECIPE = """\
# One training row lends what is missing; prepared data have no random access.
dataset: tables
backbone: clinical
backbone_config: {num_tokens: 2, token_width: 8, num_heads: 2}
pretrained: none
moe_enable: false
missing_type: any
missing_ratio: 0.6
fill: neighbour
fill_config: {num_supports: 1}
prompt: none
max_steps: 4
global_batch_size: 4
shuffle_buffer: 16
learning_rate: 1.0e-3
logging_steps: 1
save_steps: 2
test_split: train
per_device_eval_batch_size: 5
"""

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def prepared(folder):
    """The tables without texts, which would need a tokenizer, and volumes, which take long."""
    schema = json.loads(json.dumps(patient_layouts.SCHEMA))
    for name in ("notes", "scan"):
        schema["modalities"].pop(name)
    raw = patient_layouts.tables(folder / "raw", schema=schema)
    argv = ["tables", "--source", str(raw), "--output", str(folder / "data")]
    assert prepare_data.main(argv) == 0
    return str(folder / "data")


def test_two_processes_borrow_what_one_borrows(tmp_path):
    data, recipe = prepared(tmp_path), write_recipe(tmp_path, RECIPE)
    folders = [tmp_path / "one", tmp_path / "two"]
    words = ["--config", recipe, "--data_dir", data, "--use_cpu"]
    curves = []
    for world_size, folder in enumerate(folders, start=1):
        argv = [
            *words,
            "--output_dir",
            str(folder),
            "--dataloader_num_workers",
            str(world_size - 1),
        ]
        found = run_distributed(train_here, world_size, [argv], timeout_s=300)[0][0]
        curves.append(column(found, "loss"))
    assert len(curves[0]) == 4
    assert curves[0][0] == pytest.approx(curves[1][0], rel=1e-5)
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)  # Adam enlarges what rounding leaves
    scores = [json.loads((folder / "scores.json").read_text())["models"] for folder in folders]
    assert scores_of(scores[0]) == pytest.approx(scores_of(scores[1]), abs=1e-3)
    stored = folders[1] / FOLDER
    before = {path.name: path.stat().st_mtime_ns for path in stored.iterdir()}
    assert len(before) == 2
    assert evaluate_run.main([str(folders[1]), "--use_cpu", "--resamples", "0"]) == 0
    again = json.loads((folders[1] / "evaluation-train.json").read_text())["models"]
    assert scores_of(again) == pytest.approx(scores_of(scores[1]), abs=1e-5)
    assert {path.name: path.stat().st_mtime_ns for path in stored.iterdir()} == before


def scores_of(models):
    """Condition and metric -> value of the one model."""
    [by_condition] = models.values()
    return {
        f"{condition} {name}": value
        for condition, metrics in by_condition.items()
        for name, value in metrics.items()
        if isinstance(value, float)
    }
