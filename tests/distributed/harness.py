"""Run a function on several gloo processes and collect what each rank returns.

    results = run_distributed(my_function, 2, "text")  # calls my_function(rank, world_size, "text")

`my_function` must be importable (top level of a module). `torch.distributed` and DeepSpeed are up
when it is called. A rank that fails makes the call fail with that rank's traceback; ranks that hang
are stopped after `timeout_s` and the call says where each of them was.

A fork server imports the heavy modules once per test session, so that a call costs about a second.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

_ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "DS_LOG_LEVEL": "warning"}
_PRELOAD = ["torch", "torch.distributed", "deepspeed", "mm_moe.moe.parallel", "launch.run"]


class RankFailedError(AssertionError):
    """A rank raised, died or hung; the text holds what each failed rank had to say."""


def run_distributed(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 120,
    after_failure_s: float = 3,
) -> list[Any]:
    """Call `function(rank, world_size, *args)` on `world_size` gloo processes.

    Args:
        function: importable by name.
        world_size: number of processes.
        args: picklable.
        timeout_s: after this the ranks that still run are stopped.
        after_failure_s: so long may others run when the first has failed.

    Returns:
        The ranks' return values in the order of ranks (what `torch.save` can store).

    Raises:
        RankFailedError: a rank raised, died or did not end in time.
    """
    with tempfile.TemporaryDirectory(prefix="mm_moe_ranks_") as folder:
        port = _free_port()
        context = _context()
        processes = [
            context.Process(
                target=_main, args=(function, rank, world_size, port, folder, timeout_s, args)
            )
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        _wait(processes, timeout_s, after_failure_s)
        return _results(Path(folder), processes, timeout_s)


def _context() -> Any:
    """The fork server; the environment is set before its first start, it lives with the session."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(processes: list[BaseProcess], timeout_s: float, after_failure_s: float) -> None:
    """Wait until all ranks ended, or a moment longer than the first failure, or the timeout."""
    deadline = time.monotonic() + timeout_s + 5  # ranks dump their stacks at timeout_s
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if any(process.exitcode not in (None, 0) for process in processes):
            again = time.monotonic() + after_failure_s  # peers may report the cause as well
            deadline = min(deadline, again)
        time.sleep(0.02)
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()


def _results(folder: Path, processes: list[BaseProcess], timeout_s: float) -> list[Any]:
    failures = []
    for rank, process in enumerate(processes):
        if process.exitcode != 0:
            log = folder / f"{rank}.err"
            said = log.read_text() if log.exists() else ""
            said = said or f"no word within {timeout_s:g} s"
            failures.append(f"rank {rank} ended with status {process.exitcode}:\n{said}")
    if failures:
        raise RankFailedError("\n".join(failures))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(len(processes))]


def _main(
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    port: int,
    folder: str,
    timeout_s: float,
    args: tuple[Any, ...],
) -> None:
    import deepspeed
    import torch.distributed as dist

    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    # Loader workers start as in a real run; by the fork server each would import for seconds.
    multiprocessing.set_start_method("fork", force=True)
    with open(Path(folder, f"{rank}.err"), "w") as log:
        faulthandler.dump_traceback_later(timeout_s, file=log, exit=True)
        try:
            deepspeed.init_distributed(dist_backend="gloo", verbose=False)
            torch.save(function(rank, world_size, *args), Path(folder, f"{rank}.pt"))
            dist.barrier()
            dist.destroy_process_group()
        except BaseException:
            traceback.print_exc(file=log)
            log.flush()
            os._exit(1)
        finally:
            faulthandler.cancel_dump_traceback_later()
