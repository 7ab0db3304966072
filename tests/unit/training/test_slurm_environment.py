"""Who a process is, read from environments as Slurm 22.05 makes them."""

import socket

import pytest

from mm_moe.errors import ConfigError, ParallelismError
from mm_moe.training import slurm

# srun in an allocation of gpu[07-08,12], two nodes taken, two tasks on each; the fourth task.
STEP = {
    "SLURM_JOB_ID": "4711",
    "SLURM_NTASKS": "6",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_NODELIST": "gpu[07-08,12]",
}
FOUND = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "gpu07",
    "MASTER_PORT": "19711",
}
# In the batch script and an interactive shell: the allocation has tasks, the program is alone.
BATCH = {
    "SLURM_JOB_ID": "4711",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_TASKS_PER_NODE": "2(x2)",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
}


def test_a_task_of_a_step():
    assert slurm.process_environment(STEP) == FOUND
    environ = STEP | {"MASTER_ADDR": "127.0.0.1"}
    slurm.adopt(environ)
    assert environ == STEP | FOUND | {"MASTER_ADDR": "127.0.0.1"}


def test_the_words_that_start_such_a_step_again():
    assert slurm.launcher(STEP) == ["srun", "--nodes=2", "--ntasks-per-node=2", "python"]
    assert slurm.launcher(BATCH) == slurm.launcher({}) == []


@pytest.mark.parametrize(
    "environ",
    [
        {},
        BATCH,
        BATCH | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"},  # salloc's own step
        STEP | {"RANK": "5"},  # torchrun, itself a task
    ],
    ids=["none", "batch", "interactive", "torchrun"],
)
def test_where_slurm_does_not_decide(environ):
    kept = dict(environ)
    slurm.adopt(kept)
    assert kept == environ


def test_an_address_set_by_hand_wins():
    found = slurm.process_environment(STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"})
    assert found == FOUND | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "7"}


@pytest.mark.parametrize(
    ("visible", "local_rank"), [("0", "0"), ("GPU-5a", "0"), ("0,1", "1"), ("", "1")]
)
def test_a_task_bound_to_one_gpu_calls_it_0(visible, local_rank):
    found = slurm.process_environment(STEP | {"CUDA_VISIBLE_DEVICES": visible})
    assert found["LOCAL_RANK"] == local_rank


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("a,b[1-2]", "a"),
        ("gpu[07-08,12],a", "gpu07"),
        ("rack[1,3]node[08-9]", "rack1node08"),
        ("c[5]-x,c[6]-x", "c5-x"),
    ],
)
def test_the_first_host(nodes, first):
    assert slurm.first_host(nodes) == first


def test_the_port_is_the_same_for_all_and_another_for_another_job_or_step():
    ports = {
        (job, step): slurm.port_of({"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
        for job in (1, 2, 3, 15_000, 14_999_999)
        for step in range(3)
    }
    assert ports[1, 0] == 15_001
    assert ports[1, 1] == 15_000 + 1 + 7919
    assert ports[15_000, 0] == 15_000
    assert len(set(ports.values())) == len(ports)
    assert all(15_000 <= port < 30_000 for port in ports.values())


def test_tasks_per_node():
    assert slurm.tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(ParallelismError, match=r"'two' is not Slurm's form, such as 8\(x2\)"):
        slurm.tasks_per_node("two")


def test_tasks_that_are_spread_unevenly_or_in_turns_are_refused():
    with pytest.raises(ParallelismError, match=r"3,1 tasks per node are uneven.*ntasks-per-node"):
        slurm.adopt(STEP | {"SLURM_STEP_TASKS_PER_NODE": "3,1"})
    cyclic = STEP | {"SLURM_PROCID": "2", "SLURM_NODEID": "0"}
    with pytest.raises(ParallelismError, match=r"rank 2 is on node number 0.*distribution=block"):
        slurm.adopt(cyclic)


def first_task(**others: str) -> dict[str, str]:
    return STEP | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"} | others


def test_an_address_that_does_not_resolve_is_refused_by_every_rank():
    for environ in (STEP, first_task()):
        with pytest.raises(ConfigError, match=r"'gpu07.invalid', does not resolve.*MASTER_ADDR"):
            slurm.adopt(environ | {"MASTER_ADDR": "gpu07.invalid"})


def test_rank_0_refuses_a_port_that_is_taken_or_none():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        environ = first_task(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        with pytest.raises(ConfigError, match=rf"port {port}, .*is taken on .*set MASTER_PORT"):
            slurm.adopt(environ)
        assert environ["RANK"] == "0"  # so that one process speaks
    slurm.adopt(first_task(MASTER_ADDR="127.0.0.1", MASTER_PORT=port))
    for wrong in ("many", "0", "65536"):
        with pytest.raises(ConfigError, match=f"MASTER_PORT '{wrong}' is no port"):
            slurm.adopt(first_task(MASTER_ADDR="127.0.0.1", MASTER_PORT=wrong))
