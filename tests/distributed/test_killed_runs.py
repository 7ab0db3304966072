"""Runs that are killed (kill -9) and started again with the same command end with the same bits.

Compared are weights, optimizer, random states, schedule, the logged numbers and the scores.
"""

from __future__ import annotations

import random

import pytest

from tests.distributed.deaths import command, differing, leftovers, run_through

pytestmark = [pytest.mark.distributed, pytest.mark.faults]
LIGHT = ("--final_evaluation", "false")
PLACES = (
    [("pass", n) for n in range(1, 10)]
    + [(f"written{share}", n) for share in (0, 30, 70) for n in (1, 2)]
    + [(place, n) for place in ("before rename", "before latest", "in prune") for n in (1, 2)]
)


def test_killed_in_an_accumulation_in_a_save_and_before_the_first(tmp_path):
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    run_through(command(quiet, *LIGHT), 1)
    deaths = [
        ("pass", 3),  # the first pass of step 2: nothing is saved yet
        (
            "pass",
            10,
        ),  # the second of step 5: goes on from step 3, in the middle of a log's interval
        ("written30", 1),  # the save of step 6
        ("before latest", 1),  # the same again, in place but not named
    ]
    assert run_through(command(killed, *LIGHT), 1, deaths) == len(deaths)
    assert differing(quiet, killed) == []
    assert leftovers(killed) == []
    assert (killed / "latest").read_text() == "checkpoint-7\n"


@pytest.mark.slow
def test_killed_in_the_comparison_and_in_the_scores(tmp_path):
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    more = ("--compare_with", "none")
    run_through(command(quiet, *more), 1)
    deaths = [
        ("final weights", 1),
        ("pass", 3),  # of the comparison, since the model is trained already
        ("pass", 9),
        ("written70", 1),
        ("scoring", 1),
        ("scoring", 2),
    ]
    assert run_through(command(killed, *more), 1, deaths) == len(deaths)
    assert differing(quiet, killed) == []


@pytest.mark.slow
@pytest.mark.parametrize(("world_size", "more"), [(2, ()), (2, ("--async_save", "true"))])
def test_many_kills_at_random(world_size, more, tmp_path):
    draw = random.Random(8)
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    more = (*LIGHT, *more, "--dataloader_num_workers", "2")
    run_through(command(quiet, *more), world_size, timeout_s=400)
    deaths = draw.sample(PLACES, 10)
    assert run_through(command(killed, *more), world_size, deaths, timeout_s=400) >= 5
    assert differing(quiet, killed) == []
    assert leftovers(killed) == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zero0", "zero1", "bf16"])
def test_kills_under_other_settings(kind, tmp_path):
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    more = ("--bf16", "true") if kind == "bf16" else ("--deepspeed", f"ds_configs/{kind}.json")
    run_through(command(quiet, *LIGHT, *more), 2, timeout_s=400)
    deaths = [("pass", 10), ("before latest", 1)]  # of step 5, which goes on from 3; of step 6
    argv = command(killed, *LIGHT, *more)
    assert run_through(argv, 2, deaths, timeout_s=400) == len(deaths)
    assert differing(quiet, killed) == []
    assert leftovers(killed) == []
