"""A real run reports to trackers, repeats steps after a resume, and each stands there once."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sqlite3
from pathlib import Path

import pytest

from tests.distributed.harness import run_distributed
from tests.distributed.runs import column, train_here, write_recipe

pytestmark = pytest.mark.distributed
TOKEN = "hf_abcdefghijklmnopqrstuvwxyz"
NAMES = [name for name in ("tensorboard", "trackio", "wandb") if importlib.util.find_spec(name)]


def run_twice(rank: int, world_size: int, folder: str, names: list[str]):
    """Train 4 steps, lose the checkpoint of the last two, and go on to 6."""
    os.environ |= {"TRACKIO_DIR": f"{folder}/trackio", "WANDB_MODE": "offline"}
    os.environ |= {"WANDB_SILENT": "true", "TRACKIO_TELEMETRY": "0"}
    run = f"{folder}/run"
    argv = ["--config", write_recipe(Path(folder)), "--output_dir", run, "--report_to", *names]
    argv += ["csv", "--hub_token", TOKEN, "--save_steps", "2", "--eval_strategy", "no"]
    argv += ["--final_evaluation", "false", "--lr_scheduler_type", "constant"]
    first = train_here(rank, world_size, [[*argv, "--max_steps", "4"]])
    shutil.rmtree(f"{run}/checkpoint-4")
    if "wandb" in names:
        import wandb

        wandb.finish()  # as the end of the first process would
    again = [*argv, "--max_steps", "6", "--resume_from_checkpoint", "latest"]
    return first + train_here(rank, world_size, [again])


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trackers")
    return folder, run_distributed(run_twice, 1, str(folder), NAMES, timeout_s=240)[0]


def test_the_local_files(done):
    folder, (first, second) = done
    assert column(second, "step") == [1, 2, 3, 4, 5, 6]
    assert column(second, "loss")[:4] == column(first, "loss")
    rows = (folder / "run" / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "1", "2", "3", "4", "5", "6"]


def test_speed_is_told_from_the_second_step_on_of_each_start(done):
    _, (_, second) = done
    told = [e["step"] for e in second["metrics"] if "perf/samples_per_second" in e]
    assert told == [2, 4, 5, 6]
    one = second["metrics"][-1]
    assert one["perf/samples_per_second"] == pytest.approx(4 / one["perf/step_time_s"])
    assert 0 <= one["perf/data_wait_share"] < 1
    assert 0 < one["perf/matmul_share"] < 1
    assert 0.05 < one["perf/memory_gb"] < 100
    assert one["perf/tokens_per_second"] > one["perf/samples_per_second"]


@pytest.mark.skipif("tensorboard" not in NAMES, reason="tensorboard is not installed")
def test_tensorboard(done):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, (_, second) = done
    reader = EventAccumulator(str(folder / "run" / "tensorboard"))
    reader.Reload()
    scalars = reader.Scalars("train/loss")
    assert [entry.step for entry in scalars] == [1, 2, 3, 4, 5, 6]
    assert [entry.value for entry in scalars] == pytest.approx(column(second, "loss"))


@pytest.mark.skipif("trackio" not in NAMES, reason="trackio is not installed")
def test_trackio(done):
    folder, _ = done
    (file,) = (folder / "trackio").glob("*.db")
    with sqlite3.connect(file) as base:
        rows = base.execute("SELECT run_name, metrics FROM metrics ORDER BY step").fetchall()
    assert {name for name, _ in rows} == {"run"}
    losses = [metrics for _, metrics in rows if b'"train/loss"' in bytes(metrics)]
    assert len(losses) == 6


@pytest.mark.skipif("wandb" not in NAMES, reason="wandb is not installed")
def test_wandb_goes_on_with_the_same_run(done):
    folder, _ = done
    files = list((folder / "run").rglob("run-*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1


def test_no_tracker_has_the_token(done):
    folder, _ = done
    for file in folder.rglob("*"):
        if file.is_file():
            assert TOKEN.encode() not in file.read_bytes(), file
