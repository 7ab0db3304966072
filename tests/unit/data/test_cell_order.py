"""Species samplers: whose turn it is, by hand, on any number of processes, after any resume."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from mm_moe.data.cells.order import SAMPLERS, pass_over, species_line, turns


def line(sizes, sampler, *, run=1, start=0, count=40, seed=0):
    found = species_line(sizes, sampler=sampler, run=run, seed=seed, start=start)
    return list(islice(found, count))


def test_alternating_by_hand():
    assert turns([3, 5], sampler="alternating", run=1, key="k").tolist() == [0, 1, 0, 1, 0, 1, 1, 1]
    # runs of 2: 0 0 | 1 1 | 0 | 1 1 | 1
    assert turns([3, 5], sampler="alternating", run=2, key="k").tolist() == [0, 0, 1, 1, 0, 1, 1, 1]


def test_longest_restarts_the_shorter_species():
    found = line([2, 3], "longest", count=8)
    assert found == [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2), (0, 3), (1, 3)]
    assert line([2, 3], "longest", run=2, count=6) == [
        (0, 0),
        (0, 1),
        (1, 0),
        (1, 1),
        (0, 2),
        (0, 3),
    ]


@pytest.mark.parametrize("sampler", [s for s in SAMPLERS if s != "longest"])
@pytest.mark.parametrize("run", [1, 4])
def test_an_epoch_has_every_cell_of_each_species_once(sampler, run):
    sizes = [17, 5, 30]
    for epoch in range(2):
        found = line(sizes, sampler, run=run, start=epoch * 52, count=52)
        wanted = [(s, epoch * size + n) for s, size in enumerate(sizes) for n in range(size)]
        assert sorted(found) == wanted


def test_uniform_draws_species_evenly_and_proportional_by_size():
    sizes = [9000, 1000]
    uniform = Counter(s for s, _ in line(sizes, "uniform", count=1000))
    proportional = Counter(s for s, _ in line(sizes, "proportional", count=1000))
    assert abs(uniform[1] - 500) < 80  # 5 standard deviations of 16
    assert abs(proportional[1] - 100) < 50
    # the small species is through after about 2000 draws; then only the other one is left
    tail = [s for s, _ in line(sizes, "uniform", start=3000, count=7000)]
    assert set(tail) == {0}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_resume_goes_on_where_it_stopped(sampler):
    whole = line([7, 12], sampler, run=3, count=60)
    for start in (1, 4, 18, 19, 20, 45):
        assert line([7, 12], sampler, run=3, start=start, count=60 - start) == whole[start:]


def test_a_species_without_cells_is_left_out():
    for sampler in SAMPLERS:
        assert {s for s, _ in line([0, 4], sampler, count=9)} == {1}


def test_epochs_and_seeds_differ():
    first, second = line([20, 20], "uniform"), line([20, 20], "uniform", start=40)
    assert [s for s, _ in first] != [s for s, _ in second]
    assert first != line([20, 20], "uniform", seed=1)


def test_windows_hold_every_block_once_and_stages_stay_together():
    size_K, stage_K = np.array([3, 3, 2, 3, 3, 1]), np.array([0, 0, 0, 1, 1, 1])
    found = pass_over(size_K, stage_K, key="k", buffer=4)
    assert sorted(found.block_K) == list(range(6))
    assert found.row_W[0] == 0
    assert found.row_W[-1] == 15
    stages = stage_K[found.block_K].tolist()
    assert stages in ([0, 0, 0, 1, 1, 1], [1, 1, 1, 0, 0, 0])
    kept = pass_over(size_K, stage_K, key="k", buffer=0)
    assert kept.block_K.tolist() == list(range(6))
    assert kept.row_W.tolist() == [0, 3, 6, 8, 11, 14, 15]
