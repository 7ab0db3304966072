"""A rank that dies or stops in mid-training: the others say so, in one line, and end with 17."""

import os
import re
import signal
import sys
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from mm_moe.errors import EXIT_LOST_RANK, LostRankError, ParallelismError
from mm_moe.training import rendezvous
from tests.distributed.harness import RankFailedError, _free_port, run_distributed
from tests.distributed.runs import RECIPE, write_recipe

pytestmark = [pytest.mark.distributed, pytest.mark.faults]


def train_until(rank, world_size, argv, victim, number, log):
    """The program, in which one rank sends itself a signal when step 3 begins."""
    from launch.cli import run_program
    from launch.train import main
    from mm_moe.training import failures
    from mm_moe.training.callbacks import Progress

    def on_step_begin(self, args, state, control, **kwargs):
        if rank == victim and state.global_step == 3:
            os.kill(os.getpid(), number)

    Progress.on_step_begin = on_step_begin
    failures.CAUSE_FIRST_S = 0.0  # no launcher looks
    sys.argv = ["launch/train.py", *argv]
    with open(f"{log}-{rank}", "w", buffering=1) as sys.stderr:
        run_program(main)


def last_words(tmp_path, world_size, victim, number, *flags):
    """What the ranks said at the end, how they ended, and how long the survivors took."""
    recipe = write_recipe(tmp_path, RECIPE + "final_evaluation: false\n")
    argv = ["--config", recipe, "--output_dir", str(tmp_path / "run"), *flags]
    log = tmp_path / "said"
    with pytest.raises(RankFailedError) as failed:
        run_distributed(train_until, world_size, argv, victim, number, str(log), after_failure_s=60)
    said = {
        rank: re.findall("^error: .*$", (tmp_path / f"said-{rank}").read_text(), re.MULTILINE)
        for rank in range(world_size)
    }
    ends = dict(re.findall(r"rank (\d) ended with status (-?\d+)", str(failed.value)))
    return said, {int(rank): int(status) for rank, status in ends.items()}


@pytest.mark.parametrize(
    ("world_size", "victim"), [(2, 0), pytest.param(4, 2, marks=pytest.mark.slow)]
)
def test_others_notice_a_killed_rank_and_say_so_in_one_line(tmp_path, world_size, victim):
    said, ends = last_words(tmp_path, world_size, victim, signal.SIGKILL)
    assert ends.pop(victim) == -signal.SIGKILL
    said.pop(victim)
    assert set(ends.values()) == {EXIT_LOST_RANK}
    for rank, lines in said.items():
        assert len(lines) == 1
        assert lines[0].startswith(f"error: rank {rank}: another process of the run died")
        assert "--resume_from_checkpoint auto" in lines[0]


def test_others_notice_a_stopped_rank_and_write_where_they_stood(tmp_path):
    said, ends = last_words(tmp_path, 2, 1, signal.SIGSTOP, "--hang_timeout_s", "8")
    assert ends[0] == EXIT_LOST_RANK
    assert len(said[0]) == 1
    assert "in phase 'forward, backward and update' at step 3" in said[0][0]
    stacks = (tmp_path / "run" / "stacks-0.txt").read_text()
    assert "all_to_all" in stacks or "all_reduce" in stacks
    assert not (tmp_path / "run" / "stacks-1.txt").exists()


def died_alone(rank, world_size):
    """Rank 1 goes while rank 0 is busy elsewhere; what rank 0 then hears, and how soon."""
    from mm_moe.training.failures import told_plainly

    if rank == 1:
        os._exit(0)  # as if it had never been; the harness must not call it a failure
    time.sleep(2)  # rank 0 loads data meanwhile
    start = time.monotonic()
    with pytest.raises(LostRankError), told_plainly(plan=""):
        dist.all_reduce(torch.ones(1))
    assert time.monotonic() - start < 30
    os._exit(EXIT_LOST_RANK)


def test_a_rank_that_died_earlier_is_noticed_in_the_next_collective():
    with pytest.raises(RankFailedError) as failed:
        run_distributed(died_alone, 2)
    assert f"rank 0 ended with status {EXIT_LOST_RANK}" in str(failed.value)


def met(rank, world_size, port, attempts):
    """The prefixes under which this rank meets the others, in one store, several times."""
    os.environ.update(MASTER_PORT=str(port), MASTER_ADDR="127.0.0.1")
    found = []
    held = []  # rank 0's server must outlive the call
    for attempt in range(attempts):
        store = rendezvous.meet(timeout_s=60)
        held.append(store)
        store.set(f"from-{rank}", str(attempt))
        store.wait([f"from-{other}" for other in range(world_size)], timedelta(seconds=60))
        found.append([store.get(f"from-{other}").decode() for other in range(world_size)])
        dist.barrier()
    return found


def test_a_later_start_does_not_read_what_an_earlier_one_left_in_the_store():
    for found in run_distributed(met, 4, _free_port(), 3):
        assert found == [["0"] * 4, ["1"] * 4, ["2"] * 4]


def missed(rank, world_size, port):
    """What rank 0 says when rank 1 never comes."""
    if rank == 0:
        os.environ.update(MASTER_PORT=str(port), WORLD_SIZE="3")
        with pytest.raises(LostRankError, match="within 2 s") as told:
            rendezvous.meet(timeout_s=2)
        return str(told.value)
    return ""


def test_who_does_not_come_is_told_in_bounded_time():
    told = run_distributed(missed, 2, _free_port())[0]
    assert told.startswith("rank 0 of 3 on ")
    assert "--rendezvous_timeout_s" in told


def test_a_taken_port_is_told_at_once(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    import socket

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(ParallelismError, match=f"port {port} is taken"):
            rendezvous.meet(timeout_s=60)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not"),
        ({"RANK": "2"}, r"RANK \(2\) must be less than WORLD_SIZE \(2\)"),
        ({"WORLD_SIZE": "two"}, r"WORLD_SIZE \('two'\) must be a whole number"),
        ({"MASTER_PORT": "70000"}, "below 65536"),
    ],
)
def test_an_environment_that_no_launcher_makes_is_refused(change, part):
    good = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    good |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    rendezvous.check_environment(good)
    rendezvous.check_environment({})
    with pytest.raises(ParallelismError, match=part):
        rendezvous.check_environment(good | change)


def test_a_number_of_processes_without_a_rank_is_refused():
    rendezvous.check_alone({})
    with pytest.raises(ParallelismError, match="RANK is not set"):
        rendezvous.check_alone({"WORLD_SIZE": "4"})


def timeouts(rank, world_size):
    """The timeouts of all groups after `wait_alike`, in seconds."""
    from mm_moe.training.watchdog import Heartbeat, Watchdog

    dist.new_group(list(range(world_size)))
    beat = Heartbeat(Watchdog(SimpleNamespace(), limit_s=0))
    beat.on_train_begin(SimpleNamespace(ddp_timeout=77), SimpleNamespace(global_step=0), None)
    groups = list(dist.distributed_c10d._world.pg_map)
    return [group._get_backend(torch.device("cpu")).options._timeout for group in groups]


def test_expert_groups_wait_as_long_as_the_whole_run():
    for found in run_distributed(timeouts, 2):
        assert found == [timedelta(seconds=77)] * len(found)
        assert len(found) == 2
