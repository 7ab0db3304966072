"""A task of `srun` as a process of the run: what torch's launchers put into the environment.

`srun python launch/train.py ...` needs no further launcher: Slurm says who each task is, and this
says it again in the words that `torch.distributed` and DeepSpeed read.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping, MutableMapping

from mm_moe.errors import ConfigError, ParallelismError

# Below the ports that Linux gives to outgoing connections (from 32768 on), above well-known ones.
FIRST_PORT, PORTS = 15_000, 15_000
PORTS_OF_A_STEP = 7919  # a prime: steps of one job lie far from each other and from the next job's


def adopt(environ: MutableMapping[str, str] | None = None) -> None:
    """Fill in RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

    Does nothing outside a step of several tasks, and nothing where RANK is set: torchrun and
    `deepspeed` know better. MASTER_ADDR and MASTER_PORT that are set win too. Must come before
    anything asks for the rank.

    Raises:
        ParallelismError: tasks are spread in a way that the layout of the experts cannot follow.
        ConfigError: the address of rank 0 does not resolve, or its port is taken.
    """
    environ = os.environ if environ is None else environ
    found = process_environment(environ)
    environ.update(found)
    if found:
        check_places(environ)
        check_address(environ["MASTER_ADDR"])  # on every rank: none shall wait for the others
        if found["RANK"] == "0":
            check_port(environ["MASTER_PORT"])


def process_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What a task of a Slurm step should find in its environment; empty where there is none.

    The variables of the *step* decide and not those of the job: an allocation says SLURM_NTASKS=16
    in its batch script and its shell as well, where a program is still one process.
    """
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if "RANK" in environ or "SLURM_PROCID" not in environ or tasks < 2:
        return {}
    counts = tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])
    node = int(environ.get("SLURM_NODEID", "0"))
    local_rank = environ.get("SLURM_LOCALID", "0")
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible and "," not in visible:
        local_rank = "0"  # bound to one GPU (--gpus-per-task), which has the number 0 in there
    found = {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": str(counts[min(node, len(counts) - 1)]),
        "MASTER_ADDR": first_host(environ["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": str(port_of(environ)),
    }
    return found | {key: environ[key] for key in ("MASTER_ADDR", "MASTER_PORT") if key in environ}


def tasks_per_node(text: str) -> list[int]:
    """Slurm's short form in full: "2(x3),1" is [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ParallelismError(
                f"SLURM_STEP_TASKS_PER_NODE {text!r} is not Slurm's form, such as 8(x2)."
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def first_host(nodes: str) -> str:
    """The first host of a list such as "gpu[03-05,9],login1", which is "gpu03": rank 0 runs there.

    As `scontrol show hostnames` has it, which not every container holds.
    """
    name = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if name is None:
        raise ParallelismError(f"SLURM_STEP_NODELIST {nodes!r} names no host.")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", name[0])


def port_of(environ: Mapping[str, str]) -> int:
    """The port at which the processes of a step meet: the same for all, without a word between."""
    job, step = int(environ["SLURM_JOB_ID"]), int(environ.get("SLURM_STEP_ID", "0"))
    return FIRST_PORT + (job + PORTS_OF_A_STEP * step) % PORTS


def check_places(environ: Mapping[str, str]) -> None:
    """Refuse tasks that do not fill the nodes evenly, one node after the other.

    Expert-parallel groups are consecutive ranks of one node.

    Raises:
        ParallelismError: names what Slurm said and the flag that mends it.
    """
    text = environ["SLURM_STEP_TASKS_PER_NODE"]
    counts = tasks_per_node(text)
    if len(set(counts)) > 1:
        raise ParallelismError(
            f"{text} tasks per node are uneven; give srun or sbatch --ntasks-per-node."
        )
    rank, node = int(environ["RANK"]), int(environ.get("SLURM_NODEID", "0"))
    if rank // counts[0] != node:
        raise ParallelismError(
            f"rank {rank} is on node number {node}, with {counts[0]} tasks per node it belongs on "
            f"number {rank // counts[0]}; give srun --distribution=block."
        )


def check_address(host: str) -> None:
    """Refuse an address of rank 0 that does not resolve here.

    Raises:
        ConfigError: names it and the variable that overrides it.
    """
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise ConfigError(
            f"the address of rank 0, {host!r}, does not resolve ({error}); set MASTER_ADDR to one "
            "that does (submit_slurm.py: --master_addr)."
        ) from error


def check_port(text: str) -> None:
    """As rank 0, refuse a port that another program holds.

    Raises:
        ConfigError: names it and the variable that overrides it.
    """
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise ConfigError(f"MASTER_PORT {text!r} is no port; unset it, or set 1 to 65535.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", int(text)))
        except OSError as error:
            raise ConfigError(
                f"port {text}, at which the processes meet, is taken on {socket.gethostname()}; "
                "set MASTER_PORT to a free one."
            ) from error


def launcher(environ: Mapping[str, str] | None = None) -> list[str]:
    """The words that start as many tasks as this step has; none outside a step of several tasks."""
    environ = os.environ if environ is None else environ
    if "SLURM_PROCID" not in environ or int(environ.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return []
    counts = tasks_per_node(environ["SLURM_STEP_TASKS_PER_NODE"])
    return ["srun", f"--nodes={len(counts)}", f"--ntasks-per-node={counts[0]}", "python"]
