"""`python -m eval.grid` with the real programs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORDS = ("--prompts", "none", "missing_aware", "--train", "both:0.5", "--seeds", "0")


def grid(*words: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "eval.grid", *WORDS, "--output", "grid", *words]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False)


def test_a_bad_pattern_is_one_line(here):
    done = grid("--test", "text:1.2")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --test: missing pattern 'text:1.2' has the ratio 1.2")
    assert done.stderr.count("\n") == 1
    assert list(here.iterdir()) == []


@pytest.mark.slow
def test_a_grid_of_real_trainings(here):
    tests = ("--test", "complete", "both:0.7")
    steps = ("--max_steps", "2", "--global_batch_size", "8", "--resamples", "50")
    done = grid(*tests, *steps)
    assert done.returncode == 0, done.stderr
    result = json.loads(Path("grid/results.json").read_text())
    assert (result["num_cells"], result["failed"], result["metric"]) == (2, {}, "accuracy")
    rows = [row for row in result["table"] if row["metric"] == "accuracy"]
    assert {(row["method"], row["test"], row["split"]) for row in rows} == {
        (method, test, split)
        for method in ("none", "missing_aware")
        for test in ("complete", "both:0.7")
        for split in ("validation", "test")
    }
    assert {row["num_rows"] for row in rows if row["split"] == "test"} == {658}
    assert len(result["comparisons"]) == 2
    assert Path("grid/report.html").stat().st_size > 10_000
    again = grid(*tests, *steps)
    assert again.stdout.count(": kept") == 2
