"""Jobs on a real Slurm of two virtual nodes: submit, train over both, preempt, requeue, finish."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from slurm_cluster import (
    ask,
    cluster,
    job,
    missing_programs,
    start_again_now,
    wait_for_end,
    wait_until,
)

from launch import submit_slurm
from mm_moe.checkpoint.store import WEIGHTS
from mm_moe.errors import ConfigError
from tests.distributed.harness import run_distributed
from tests.distributed.runs import column, read_run, train_here, write_recipe

reason = missing_programs()
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.distributed,
    pytest.mark.skipif(reason is not None, reason=reason or ""),
]
JOB = (
    *("--nodes", "2", "--gpus_per_node", "0", "--cpus_per_task", "1"),
    *("--master_addr", "127.0.0.1"),  # the names of virtual nodes do not resolve
)
# In place of train.py: says who it is, and ends as the start of the job and its rank demand.
STAND_IN = """\
import os, signal, sys, time
from mm_moe.training import slurm

signal.signal(signal.SIGUSR1, lambda *_: stop("preempted", 75))
run = sys.argv[sys.argv.index("--output_dir") + 1]

def stop(why, status):
    print(f"rank {os.environ['RANK']} {why}", flush=True)
    os.makedirs(f"{run}/checkpoint-1", exist_ok=True)
    sys.exit(status)

slurm.adopt()
names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
print("|".join(os.environ[name] for name in names), sys.argv[1:], flush=True)
start = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
if start == 0:
    time.sleep(600)
if start == 1 and os.environ["RANK"] == "0":
    os.makedirs(f"{run}/checkpoint-2")
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(17)
"""


@pytest.fixture(scope="module")
def conf():
    with cluster() as path:
        yield path


@pytest.fixture
def place(conf, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_CONF", str(conf))
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def submit_stand_in(*flags: str) -> str:
    """A job whose script runs `STAND_IN`; its number."""
    Path("stand_in.py").write_text(STAND_IN)
    words = ["--ep_size", "2", "--output_dir", "run"]
    _, _, script = submit_slurm.prepare([*JOB, *flags, "--", *words])
    (line,) = [text for text in script.splitlines() if "launch/train.py" in text]
    return submit_slurm.submit(script.replace(line.split()[1], "stand_in.py"))


def log_file(number: str) -> Path:
    return Path(f"run-slurm-{number}.log")


def log_of(number: str) -> str:
    return log_file(number).read_text() if log_file(number).exists() else ""


def again(number: str, restarts: int) -> None:
    start_again_now(number, restarts=restarts, log=log_file(number))


def test_a_job_is_requeued_while_it_saves_and_no_longer(place):
    number = submit_stand_in()
    wait_until("two ranks", lambda: log_of(number).count("|127.0.0.1") == 2, timeout_s=120)
    for rank in ("0|2|0|1|127.0.0.1", "1|2|0|1|127.0.0.1"):
        flags = ["--ep_size", "2", "--output_dir", "run", "--resume_from_checkpoint", "auto"]
        assert f"{rank} {flags}" in log_of(number)
    ask("scancel", "--batch", "--signal=USR1", number)  # what Slurm does before the limit
    again(number, 1)  # then rank 0 is killed, after it saved
    again(number, 2)  # then rank 0 loses another before anything is saved
    assert wait_for_end(number, timeout_s=120) == "FAILED"
    assert (job(number, "Restarts"), job(number, "ExitCode")) == ("2", "17:0")
    log = log_of(number)
    assert log.count("preempted\n") == 2
    assert "preempted, the run is saved (status 75); back into the queue, 99 times left" in log
    assert "start 2: a process died (status 137)" in log
    assert "start 3: on node[1-2], from checkpoint-2" in log
    assert "start 3: ended with status 17" in log


def test_the_last_start_ends_with_its_own_status(place):
    number = submit_stand_in("--max_requeues", "0")
    wait_until("two ranks", lambda: log_of(number).count("|127.0.0.1") == 2, timeout_s=120)
    ask("scancel", "--batch", "--signal=USR1", number)
    assert wait_for_end(number, timeout_s=120) == "FAILED"
    assert (job(number, "Restarts"), job(number, "ExitCode")) == ("0", "75:0")


def test_what_slurm_refuses_is_passed_on_in_one_line(place):
    with pytest.raises(ConfigError) as caught:
        submit_slurm.main([*JOB, "--partition", "nowhere", "--", "--output_dir", "run"])
    said = str(caught.value)
    assert said.startswith("Slurm refused the job: error: invalid partition specified: nowhere")
    assert "\n" not in said
    assert list(place.iterdir()) == []


def submit_training(recipe: str, run: str, *more: str) -> str:
    """The number of a job that trains for real, with the experts over both nodes."""
    words = ["--config", recipe, "--ep_size", "2", "--output_dir", run]
    words += ["--final_evaluation", "false", "--report_to", "none", *more]
    assert submit_slurm.main([*JOB, "--", *words]) == 0
    (number,) = [
        line.split()[-1] for line in ask("squeue", "-h", "-o", "%i").splitlines() if line.strip()
    ]
    return number


def quiet_run(recipe: str, run: str, *more: str) -> dict[str, Any]:
    """The same training in two processes that nobody disturbs."""
    words = ["--config", recipe, "--ep_size", "2", "--output_dir", run]
    words += ["--final_evaluation", "false", "--report_to", "none", *more]
    return run_distributed(train_here, 2, [words], timeout_s=400)[0][0]


def test_it_trains_over_two_nodes(place):
    recipe, more = write_recipe(place), ("--max_steps", "4", "--save_strategy", "no")
    number = submit_training(recipe, "run", *more)
    quiet = quiet_run(recipe, "quiet", *more)
    assert wait_for_end(number, timeout_s=300) == "COMPLETED", log_of(number)
    assert "2 process(es), experts over 2" in log_of(number)
    assert "srun --nodes=2 --ntasks-per-node=1 python launch/train.py" in log_of(number)
    assert column(read_run(Path("run")), "loss") == column(quiet, "loss")
    same_weights("run", "quiet")


def same_weights(run: str, other: str) -> None:
    ours, theirs = (load_file(Path(name, "final", WEIGHTS)) for name in (run, other))
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []


@pytest.mark.slow
@pytest.mark.faults
def test_a_preempted_run_ends_as_if_nothing_had_been(place):
    recipe, more = write_recipe(place), ("--max_steps", "40", "--save_steps", "1000")
    number = submit_training(recipe, "run", *more)
    metrics = Path("run/metrics.jsonl")
    wait_until(
        "training begun",
        lambda: metrics.exists() and metrics.read_text().count("\n") > 0,
        timeout_s=240,
    )
    ask("scancel", "--batch", "--signal=USR1", number)
    again(number, 1)
    assert "preempted, the run is saved (status 75)" in log_of(number), log_of(number)
    assert wait_for_end(number, timeout_s=400) == "COMPLETED", log_of(number)
    assert job(number, "Restarts") == "1"
    quiet = column(quiet_run(recipe, "quiet", *more), "loss")
    assert len(quiet) == 40
    assert column(read_run(Path("run")), "loss") == quiet
    same_weights("run", "quiet")


@pytest.mark.slow
def test_slurm_itself_gives_notice_before_the_limit(place):
    number = submit_stand_in("--time", "00:02:00", "--signal_before_s", "60")
    again(number, 1)
    assert "asking for a checkpoint" in log_of(number)
    assert "preempted, the run is saved (status 75)" in log_of(number)
    ask("scancel", number)
    assert wait_for_end(number, timeout_s=120) in ("CANCELLED", "FAILED")
