"""A signal to one rank: every rank saves the same step and stops, and the run goes on as if never.

SIGUSR1 is sent in the middle of a gradient accumulation, SIGTERM while the model is built, SIGINT
during a comparison's training, and all of them a second time while the first is being honoured.
"""

from __future__ import annotations

import os
import shlex
import signal

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.harness import run_distributed
from tests.distributed.runs import read_run, train_here, write_recipe

pytestmark = [pytest.mark.distributed, pytest.mark.faults]
STEPS, STOP = 6, 3


def command(folder, name, *more):
    return [
        *("--config", write_recipe(folder), "--output_dir", str(folder / name)),
        *("--gradient_accumulation_steps", "2", "--ep_size", "2", "--max_steps", str(STEPS)),
        *("--save_steps", "5", "--logging_steps", "2", *more),
    ]


def signalled(rank, world_size, argv, number, at):
    """Run until the signal, which rank 1 sends to itself; what the rank ends by, and its handler.

    `at`: (which training of the run, from 0; step; micro-batch from 0), "build", or "scoring".
    """
    from launch import assemble, scoring
    from mm_moe.errors import StoppedError
    from mm_moe.training.trainer import MultimodalTrainer

    compute, build, trainings = MultimodalTrainer.compute_loss, assemble.dense_model, []

    def send():
        if rank == 1:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), signal.SIGTERM)  # the launcher's, a moment later

    def compute_and_send(self, *args, **kwargs):
        if self not in trainings:
            trainings.append(self)
        if (len(trainings) - 1, self.guard.step + 1, len(self.guard._losses)) == at:
            send()
        return compute(self, *args, **kwargs)

    def build_and_send(*args):
        if at == "build":
            send()
        return build(*args)

    def predict_and_send(*args, **kwargs):
        if at == "scoring":
            send()
        return predict(*args, **kwargs)

    predict, scoring.predict = scoring.predict, predict_and_send
    MultimodalTrainer.compute_loss, assemble.dense_model = compute_and_send, build_and_send
    before = signal.getsignal(signal.SIGTERM)
    try:
        train_here(rank, world_size, [argv])
    except StoppedError as error:
        same = signal.getsignal(signal.SIGTERM) is before
        return {"status": error.exit_code, "words": str(error), "handler_is_back": same}
    return None


def saved(folder):
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def test_one_rank_is_told_and_all_save_that_step(tmp_path):
    stopped = command(tmp_path, "stopped")
    at = (0, STOP, 1)  # between the micro-batches
    found = run_distributed(signalled, 2, stopped, signal.SIGUSR1, at, timeout_s=300)
    assert [rank["status"] for rank in found] == [75, 75]
    assert all(rank["handler_is_back"] for rank in found)
    assert saved(tmp_path / "stopped") == [f"checkpoint-{STOP}"]
    words = found[0]["words"]
    assert words.startswith(f"SIGUSR1, replay at step {STOP}. Saved checkpoint-{STOP}. Go on with:")
    again = shlex.split(words.split("Go on with: ")[1])
    again = again[again.index("launch/train.py") + 1 :]
    assert again[-2:] == ["--resume_from_checkpoint", "latest"]

    whole = command(tmp_path, "whole")
    run_distributed(train_here, 2, [again, whole], timeout_s=300)
    one, two = (
        load_file(tmp_path / n / "final" / "model.safetensors") for n in ("stopped", "whole")
    )
    assert all(torch.equal(one[name], two[name]) for name in two)
    steps = [entry["step"] for entry in read_run(tmp_path / "stopped")["metrics"]]
    assert steps == [2, 4, 6]


def test_an_evaluation_that_a_signal_cuts_short_is_made_up_for(tmp_path):
    more = ("--eval_strategy", "steps", "--eval_steps", "2", "--max_steps", "4")
    argv = command(tmp_path, "run", *more, "--final_evaluation", "false")
    found = run_distributed(signalled, 2, argv, signal.SIGTERM, "scoring", timeout_s=300)
    assert [rank["status"] for rank in found] == [75, 75]
    assert found[0]["words"].startswith("SIGTERM, during an evaluation. Saved checkpoint-2.")
    [loss] = read_run(tmp_path / "run")["metrics"]
    assert "loss" in loss

    argv += ["--resume_from_checkpoint", "latest"]
    lines = run_distributed(train_here, 2, [argv], timeout_s=300)[0][0]["metrics"]
    assert lines[0] == loss
    assert [line["step"] for line in lines] == [2, 2, 4, 4]
    for line in (lines[1], lines[3]):
        assert any(key.startswith("eval_complete_") for key in line)


def test_a_signal_in_the_final_scoring(tmp_path):
    argv = command(tmp_path, "run", "--max_steps", "2")
    found = run_distributed(signalled, 2, argv, signal.SIGTERM, "scoring", timeout_s=300)
    assert [rank["status"] for rank in found] == [75, 75]
    assert found[0]["words"].startswith("SIGTERM, during an evaluation. Saved checkpoint-2.")


def test_a_signal_before_the_first_step_saves_nothing(tmp_path):
    argv = command(tmp_path, "run")
    found = run_distributed(signalled, 2, argv, signal.SIGTERM, "build", timeout_s=300)
    assert [rank["status"] for rank in found] == [75, 75]
    assert saved(tmp_path / "run") == []
    assert "SIGTERM, replay was not begun. There was nothing to save." in found[0]["words"]
    assert found[0]["words"].endswith("--resume_from_checkpoint auto")


def test_a_signal_while_a_comparison_is_trained(tmp_path):
    argv = command(tmp_path, "run", "--compare_with", "none", "--max_steps", "2")
    found = run_distributed(signalled, 2, argv, signal.SIGINT, (1, 1, 0), timeout_s=300)
    assert [rank["status"] for rank in found] == [130, 130]
    assert saved(tmp_path / "run") == ["checkpoint-2"]
    assert saved(tmp_path / "run" / "compare-none") == ["checkpoint-1"]  # it goes on there
    assert found[0]["words"].startswith("SIGINT, comparison: none at step 1. Saved checkpoint-2.")
