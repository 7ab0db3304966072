"""The processes of a run find each other, or say within a bounded time who did not come."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist

from mm_moe.errors import LostRankError, ParallelismError

_NEEDED = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK")
_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
_START = "mm_moe/start"
_START_BY = "start with deepspeed, torchrun or python launch/train.py, which set it"


def check_environment(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse variables of a launcher that are missing, no numbers, or contradict each other.

    Raises:
        ParallelismError: names the variable and the rule.
    """
    if "RANK" not in environment:
        return
    for name in _NEEDED:
        if not environment.get(name):
            raise ParallelismError(f"RANK is set and {name} is not; {_START_BY}.")
    for name in _NUMBERS:
        if not environment[name].isdecimal():
            raise ParallelismError(f"{name} ({environment[name]!r}) must be a whole number.")
    rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    if not rank < world_size:
        raise ParallelismError(
            f"RANK ({rank}) must be less than WORLD_SIZE ({world_size}); are the node ranks 0 to "
            "nodes - 1, and the number of nodes the same on each?"
        )
    if int(environment["MASTER_PORT"]) > 65535:
        raise ParallelismError(f"MASTER_PORT ({environment['MASTER_PORT']}) must be below 65536.")


def check_alone(environment: Mapping[str, str] = os.environ) -> None:
    """Refuse to run as one process where somebody meant several.

    Raises:
        ParallelismError: WORLD_SIZE says more than one, and no RANK which of them this is.
    """
    if "RANK" not in environment and environment.get("WORLD_SIZE", "1") != "1":
        raise ParallelismError(
            f"WORLD_SIZE is {environment['WORLD_SIZE']!r} and RANK is not set; {_START_BY}, or "
            "unset WORLD_SIZE for one process."
        )


def meet(*, timeout_s: float) -> dist.Store:
    """Wait until every process of the run is there; returns the store of this start.

    torch itself waits half an hour for a host that does not answer. The store of `torchrun` with
    `--master_port` outlives a restart and remembers the addresses of dead processes, to which the
    new ones then try to connect: ours has a prefix that only the processes of one start know.

    Raises:
        ParallelismError: the port is taken.
        LostRankError: not all came within `timeout_s`; names who is missing where it can.
    """
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    here = f"rank {rank} of {world_size} on {socket.gethostname()}"
    limit = timedelta(seconds=timeout_s)
    try:
        store = next(dist.rendezvous("env://", timeout=limit))[0]
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error):
            raise ParallelismError(
                f"{here}: port {port} is taken on this machine: by another run (give another "
                "--master_port), by one that has not ended yet, or by a node with the same node "
                "rank."
            ) from error
        raise LostRankError(_absent(here, f"{address}:{port} did not answer", timeout_s)) from error
    except dist.DistStoreError as error:
        raise LostRankError(_absent(here, "others did not come", timeout_s)) from error
    try:
        start = _call(store, world_size, limit) if rank == 0 else _answer(store, rank, limit)
    except LookupError as error:
        raise LostRankError(_absent(here, str(error.args[0]), timeout_s)) from error
    return dist.PrefixStore(start, store)


def _call(store: dist.Store, world_size: int, limit: timedelta) -> str:
    """As rank 0: name this start, wait for everyone's answer to it, and let them go.

    Raises:
        LookupError: who did not come.
    """
    start = uuid.uuid4().hex
    store.set(_START, start)
    answers = [f"{start}/{rank}" for rank in range(1, world_size)]
    try:
        store.wait(answers, limit)
    except dist.DistStoreError as error:
        missing = [key.partition("/")[2] for key in answers if not store.check([key])]
        again = ", and another process is rank 0 too" * (store.get(_START).decode() != start)
        raise LookupError(f"rank(s) {', '.join(missing)} did not come{again}") from error
    store.set(f"{start}/all", " ".join(store.get(key).decode() for key in answers))
    return start


def _answer(store: dist.Store, rank: int, limit: timedelta) -> str:
    """As another rank: answer to rank 0's call until it is one in which this process is counted.

    A call of an earlier start counts a process that is dead by now.

    Raises:
        LookupError: no such call came.
    """
    mine, answered = uuid.uuid4().hex, ""
    deadline = time.monotonic() + limit.total_seconds()
    while time.monotonic() < deadline:
        start = store.get(_START).decode() if store.check([_START]) else ""
        if start and start != answered:
            store.set(f"{start}/{rank}", mine)
            answered = start
        everyone = f"{start}/all"
        if start and store.check([everyone]) and mine in store.get(everyone).decode().split():
            return start
        time.sleep(0.05)
    raise LookupError(f"rank 0 did not count this process among those of the start {answered!r}")


def _absent(here: str, what: str, timeout_s: float) -> str:
    return (
        f"{here}: {what} within {timeout_s:g} s. Look at the other nodes' output; check that "
        "--master_addr and --master_port are the same on all, that the port is open between them, "
        "and that each node has its own --node_rank; --rendezvous_timeout_s waits longer."
    )
