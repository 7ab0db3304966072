"""Every launcher trains the same run: losses of all ways to start two processes are equal.

Two "nodes" of these tests are two starts on this machine that differ in their node rank.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from launch.supervise import newest_step
from tests.distributed.harness import _free_port, run_distributed
from tests.distributed.runs import RECIPE, column, read_run, train_here, write_recipe

pytestmark = [pytest.mark.distributed, pytest.mark.faults]

ROOT = Path(__file__).parents[2]
SHORT = RECIPE + "final_evaluation: false\n"
BIN = Path(sys.executable).parent
WAIT_S = 400  # a start takes 10 s alone, and a minute and more beside other work


def start(command, folder, name, **environment):
    """A launcher in its own process group, its words in a file."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    environment.setdefault("DS_ACCELERATOR", "cpu")
    with (folder / f"{name}.log").open("w") as log:
        return subprocess.Popen(
            shlex.split(command), stdout=log, stderr=log, cwd=ROOT, env=environment
        )


def run_all(commands, folder):
    """Statuses and words of launchers that are started together."""
    processes = [start(command, folder, str(i)) for i, command in enumerate(commands)]
    try:
        statuses = [process.wait(WAIT_S) for process in processes]
    finally:
        for process in processes:
            end_tree(process)
    return statuses, [(folder / f"{i}.log").read_text() for i in range(len(commands))]


def end_tree(process):
    """Leave nothing of a launcher that did not end."""
    if process.poll() is None:
        for child in psutil.Process(process.pid).children(recursive=True):
            child.kill()
        process.kill()


def ranks_of(process):
    """The training processes below a launcher, by rank."""
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            line = child.cmdline()
            if str(ROOT / "launch/train.py") in line and "launcher" not in " ".join(line[:4]):
                rank = child.environ().get("RANK")
                if rank is not None and not child.name().startswith("torchrun"):
                    found.setdefault(int(rank), child)  # its data workers look alike
        except psutil.Error:
            continue
    return found


def wait_for(what, *, until=WAIT_S):
    """Wait for a condition, and say so if it does not come."""
    deadline = time.monotonic() + until
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def steps_logged(run):
    """How many steps a run has logged so far."""
    metrics = run / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


@pytest.fixture
def quiet_run(tmp_path):
    """The folder of an undisturbed run of two processes."""
    recipe = write_recipe(tmp_path, SHORT.replace("save_steps: 10", "save_steps: 5"))
    argv = ["--config", recipe, "--ep_size", "2", "--output_dir", str(tmp_path / "quiet")]
    run_distributed(train_here, 2, [argv], timeout_s=WAIT_S)
    return tmp_path / "quiet"


def train(tmp_path, output, *flags):
    """The program with the flags of the quiet run."""
    words = [str(ROOT / "launch/train.py"), "--config", str(tmp_path / "recipe.yaml")]
    return shlex.join([*words, "--ep_size", "2", "--output_dir", str(tmp_path / output), *flags])


def weights(run):
    """The final weights of a run."""
    return load_file(run / "final" / "model.safetensors")


def same_weights(run, other):
    """Whether two runs ended with equal bits."""
    ours, theirs = weights(run), weights(other)
    return ours.keys() == theirs.keys() and all((ours[k] == theirs[k]).all() for k in ours)


def launcher_lines(kind, program, folder):
    """The command lines that start two processes, one per node where there are two nodes."""
    port = _free_port()
    hosts = folder / "hosts"
    hosts.write_text("node-a slots=1\nnode-b slots=1\n")
    deepspeed = f"{BIN}/deepspeed --master_addr 127.0.0.1 --master_port {port}"
    by_host = f"{deepspeed} --hostfile {shlex.quote(str(hosts))} --no_ssh"
    one_host = folder / "one_host"
    one_host.write_text("localhost slots=2\n")
    torchrun = f"{BIN}/torchrun --master_addr 127.0.0.1 --master_port {port} --nproc_per_node"
    by_hand = f"WORLD_SIZE=2 LOCAL_WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT={port} "
    by_hand += sys.executable
    return {
        "deepspeed": [f"{deepspeed} --num_accelerators 2 {program}"],
        "deepspeed hostfile, one node": [
            f"{deepspeed} --hostfile {shlex.quote(str(one_host))} --no_ssh_check {program}"
        ],
        "deepspeed --no_ssh": [f"{by_host} --node_rank {node} {program}" for node in range(2)],
        "torchrun": [f"{torchrun} 2 {program}"],
        "python": [f"env RANK={rank} LOCAL_RANK={rank} {by_hand} {program}" for rank in range(2)],
        "torchrun, two nodes": [
            f"{torchrun} 1 --nnodes 2 --node_rank {node} {program}" for node in range(2)
        ],
    }[kind]


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        "deepspeed",
        "deepspeed hostfile, one node",
        "deepspeed --no_ssh",
        "torchrun",
        "torchrun, two nodes",
        "python",
    ],
)
def test_every_launcher_gives_the_losses_of_the_harness(tmp_path, kind):
    quiet = ["--config", write_recipe(tmp_path, SHORT), "--ep_size", "2", "--max_steps", "3"]
    quiet += ["--output_dir", str(tmp_path / "expected")]
    program = train(tmp_path, "launched", "--max_steps", "3")
    (expected,) = run_distributed(train_here, 2, [quiet], timeout_s=WAIT_S)[0]
    statuses, said = run_all(launcher_lines(kind, program, tmp_path), tmp_path)
    assert set(statuses) == {0}, said
    assert column(read_run(tmp_path / "launched"), "loss") == column(expected, "loss")
    assert len(column(expected, "loss")) == 3
    left = [path.name for path in Path("/dev/shm").glob("deepspeed_allreduce_buffer_*")]
    port = launcher_port(said)
    assert not [name for name in left if port and f"_{port}_" in name]


def launcher_port(said):
    """The port in what `deepspeed` logs of its command."""
    words = " ".join(said).split("--master_port=")
    return words[1].split()[0] if len(words) > 1 else None


@pytest.mark.slow
def test_torchrun_restarts_after_a_kill_and_ends_with_the_same_weights(quiet_run, tmp_path):
    program = train(tmp_path, "killed", "--resume_from_checkpoint", "auto")
    line = f"{BIN}/torchrun --max_restarts 3 --master_port {_free_port()} --nproc_per_node 2"
    process = start(f"{line} {program}", tmp_path, "torchrun")
    try:
        wait_for(lambda: steps_logged(tmp_path / "killed") >= 7)
        ranks_of(process)[1].send_signal(signal.SIGKILL)
        assert process.wait(WAIT_S) == 0
    finally:
        end_tree(process)
    assert same_weights(tmp_path / "killed", quiet_run)
    steps = [entry["step"] for entry in read_run(tmp_path / "killed")["metrics"]]
    assert steps == list(range(1, 21))


@pytest.mark.slow
def test_the_supervisor_restarts_deepspeed_after_a_stopped_rank(quiet_run, tmp_path):
    flags = ["--resume_from_checkpoint", "auto", "--hang_timeout_s", "10"]
    line = f"{BIN}/deepspeed --num_accelerators 2 --master_port {_free_port()}"
    line = f"{line} {train(tmp_path, 'stopped', *flags)}"
    process = start(
        f"{sys.executable} {ROOT}/launch/supervise.py --backoff_s 0 -- {line}", tmp_path, "watch"
    )
    try:
        wait_for(lambda: steps_logged(tmp_path / "stopped") >= 7)
        stopped = ranks_of(process)[1]
        stopped.send_signal(signal.SIGSTOP)
        assert process.wait(WAIT_S) == 0
        assert not stopped.is_running()
    finally:
        end_tree(process)
    said = (tmp_path / "watch.log").read_text()
    assert "error: rank 0 stood still for 10 s" in said
    assert "supervise: ended with status 17, newest checkpoint: checkpoint-" in said
    assert newest_step(tmp_path / "stopped") == 20
    assert same_weights(tmp_path / "stopped", quiet_run)


def test_a_killed_rank_ends_the_launcher_and_every_process_of_it(tmp_path):
    write_recipe(tmp_path, SHORT)
    line = f"{BIN}/deepspeed --num_accelerators 2 --master_port {_free_port()}"
    flags = ["--max_steps", "1000", "--save_strategy", "no", "--dataloader_num_workers", "1"]
    process = start(f"{line} {train(tmp_path, 'run', *flags)}", tmp_path, "deepspeed")
    try:
        wait_for(lambda: steps_logged(tmp_path / "run") >= 2)
        everyone = psutil.Process(process.pid).children(recursive=True)
        ranks_of(process)[0].send_signal(signal.SIGKILL)
        assert process.wait(60) == 256 - signal.SIGKILL  # within 30 s on an idle machine
        wait_for(lambda: not any(child.is_running() for child in everyone), until=60)
    finally:
        end_tree(process)
    said = (tmp_path / "deepspeed.log").read_text()
    assert said.count("error: rank 1: another process of the run died") == 1
    assert "Traceback" not in said
