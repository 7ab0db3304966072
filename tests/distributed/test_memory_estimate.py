"""The planner's bytes are those that real steps of the training program allocate."""

import json
import sys

import pytest

from eval.benchmarks import memory_estimate
from eval.benchmarks.memory_estimate import compare, measure, plan_flags
from launch import plan
from tests.distributed.harness import run_distributed


def measured_here(rank: int, world_size: int, flags: list[str]) -> dict:
    found = measure(flags)
    sys.stdout.flush()
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("case", memory_estimate.QUICK, ids=lambda case: case.name)
def test_estimate_is_within_15_percent(case, tmp_path):
    flags, file = case.flags(tmp_path), tmp_path / "plan.json"
    words = [*flags, "--output_dir", str(tmp_path / "run")]
    ranks = run_distributed(measured_here, case.processes, words, timeout_s=300)
    plan.main(["--json", str(file), *plan_flags(ranks), *flags])
    row = compare(case, ranks, json.loads(file.read_text()))
    assert 0.85 <= row["ratio"] <= 1.15, memory_estimate.line(row)
