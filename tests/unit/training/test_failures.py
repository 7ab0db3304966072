"""Torch's errors in words of ours; its messages are those that were seen."""

import pytest
import torch

from launch.finish import plan_command
from mm_moe.errors import LostRankError, MemoryLimitError
from mm_moe.training.failures import told_plainly

PLACE = "[/x/third_party/gloo/gloo/transport/tcp/pair.cc:561]"


def told(error, kind):
    """What becomes of an error."""
    with pytest.raises(kind) as ended, told_plainly(plan="PLAN"):
        raise error
    return str(ended.value)


def test_memory_of_a_gpu_is_told_with_what_was_asked_and_the_plan():
    message = "CUDA out of memory. Tried to allocate 20.50 GiB. GPU 0 has a total capacity of 79"
    said = told(torch.OutOfMemoryError(message), MemoryLimitError)
    assert said == "rank 0: out of memory: Tried to allocate 20.50 GiB. See what fits: PLAN"
    assert MemoryLimitError.exit_code == 2


def test_memory_of_the_host_is_told_too():
    with pytest.raises(MemoryLimitError, match=f"tried to allocate {2**58} bytes") as ended:  # noqa: SIM117
        with told_plainly(plan="PLAN"):
            torch.empty(2**58, dtype=torch.uint8)
    assert str(ended.value).endswith("See what fits: PLAN")


@pytest.mark.parametrize(
    "message",
    [
        f"{PLACE} Connection closed by peer [127.0.0.1]:46723. This is typically caused by a crash",
        f"{PLACE} Read error [127.0.0.1]:9106: Connection reset by peer",
        f"{PLACE} Timed out waiting 1800000ms for recv operation to complete",
        "NCCL error: remote process exited or there was a network error",
        "DataLoader worker (pid 5076) is killed by signal: Killed. ",
    ],
)
def test_a_lost_process_is_told_without_the_place_in_torchs_source(message):
    said = told(RuntimeError(message), LostRankError)
    assert "pair.cc" not in said
    assert "--resume_from_checkpoint auto" in said
    assert LostRankError.exit_code == 17


def test_every_other_error_is_left_alone():
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert told(error, RuntimeError) == str(error)


def test_the_plan_takes_the_runs_own_flags_without_secrets_and_places(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    argv = ["--local_rank=0", "--num_experts", "8", "--output_dir", "RUN", "--hub_token", "hf_x"]
    assert plan_command(argv) == "python launch/plan.py --world_size 4 --num_experts 8"
