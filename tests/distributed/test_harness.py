"""The spawner itself: values come back in order, a failure and a hang are told, not waited for."""

import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import RankFailedError, run_distributed

pytestmark = pytest.mark.distributed


def _sum_of_ranks(rank, world_size, offset):
    total = torch.tensor(float(rank + offset))
    dist.all_reduce(total)
    return rank, total.item()


def _one_rank_fails(rank, world_size):
    if rank == 1:
        raise ValueError("rank one is unwell")
    dist.barrier()


def _one_rank_stays_away(rank, world_size):
    if rank == 0:
        dist.barrier()
    time.sleep(60)


def test_values_come_back_in_the_order_of_ranks():
    assert run_distributed(_sum_of_ranks, 2, 10) == [(0, 21.0), (1, 21.0)]


def test_a_failing_rank_is_quoted():
    with pytest.raises(RankFailedError, match="rank one is unwell"):
        run_distributed(_one_rank_fails, 2)


def test_a_hang_ends_and_says_where():
    with pytest.raises(RankFailedError, match="_one_rank_stays_away"):
        run_distributed(_one_rank_stays_away, 2, timeout_s=3)
