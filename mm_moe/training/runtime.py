"""Processes: start-up, agreement between ranks, and what to tell the user while it happens."""

from __future__ import annotations

import contextlib
import datetime
import io
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mm_moe.training.rendezvous import meet

logger = logging.getLogger("mm_moe")


def rank() -> int:
    """This process among those of the run (known before the process group exists)."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this process is rank 0."""
    return rank() == 0


def world_size() -> int:
    """Number of processes of the run."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int:
    """Number of processes on this node; launchers that do not say are taken as one node."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", str(world_size()))))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _shared_memory_operator_is_built() -> bool:
    """Whether DeepSpeed's CPU collective was compiled before, by this user for this torch."""
    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    base = Path(root) if root else Path.home() / ".cache" / "torch_extensions"
    return any(base.glob("**/deepspeed_shm_comm*.so"))


def start(*, timeout_s: float = 1800, rendezvous_timeout_s: float = 600) -> None:
    """Join the process group, as rank 0 of 1 when no launcher set the environment.

    Must run before anything imports DeepSpeed: its accelerator is chosen at import.

    Args:
        timeout_s: how long a collective may wait.
        rendezvous_timeout_s: how long the processes wait for each other at the start.

    Raises:
        ParallelismError: the port is taken, or two processes have one rank.
        LostRankError: not all processes came in time.
    """
    on_gpu = torch.cuda.is_available()
    if not on_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not on_gpu and is_main() and not _shared_memory_operator_is_built():
        logger.warning(
            "DeepSpeed compiles its CPU collective now: about a minute, only this first time."
        )
    backend = "nccl" if on_gpu else "gloo"
    if not dist.is_initialized():
        _join(backend, timeout_s=timeout_s, rendezvous_timeout_s=rendezvous_timeout_s)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that the operator was built
        deepspeed.init_distributed(dist_backend=backend, verbose=False)
    _unlink_shared_memory()


def _join(backend: str, *, timeout_s: float, rendezvous_timeout_s: float) -> None:
    """Make the process group, as DeepSpeed would, from the store of this start."""
    device = torch.device("cuda", torch.cuda.current_device()) if backend == "nccl" else None
    dist.init_process_group(
        backend,
        store=meet(timeout_s=rendezvous_timeout_s),
        rank=rank(),
        world_size=world_size(),
        timeout=datetime.timedelta(seconds=timeout_s),
        device_id=device if world_size() > 1 else None,
    )


def _unlink_shared_memory() -> None:
    """Take the name from the shared memory of DeepSpeed's CPU collective: it ends with its users.

    DeepSpeed never removes the 66 MB that each rank leaves behind, under the name of the port.
    """
    barrier()  # every rank has opened those of the others
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank()}"
    Path("/dev/shm", name).unlink(missing_ok=True)


def stop() -> None:
    """Leave the process group; without this a rank can abort at exit."""
    if dist.is_initialized():
        dist.destroy_process_group()


def allow_another_trainer() -> None:
    """Let this process build a further Trainer under DeepSpeed.

    accelerate keeps one DeepSpeed plugin per process for good; the process group stays as it is.
    """
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=False)


def agree(value: Any) -> Any:
    """Rank 0's value on every rank (any picklable object)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_main(function: Callable[[], Any]) -> Any:
    """What rank 0 finds, on every rank; what it raises is raised on every rank. A collective."""
    outcome: tuple[Any, Exception | None] = (None, None)
    if is_main():
        try:
            outcome = function(), None
        except Exception as error:  # whatever it is: the other ranks wait for a word
            outcome = None, error
    found, failure = agree(outcome)
    if failure is not None:
        raise failure
    return found


def gather_objects(value: Any) -> list[Any]:
    """Every rank's value, in rank order, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on at least one rank."""
    return any(gather_objects(bool(flag)))


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()
