"""`python -m eval.interactions` with the real programs: categorise, train, fuse, evaluate."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLE = "table/interactions.parquet"


def program(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, env=os.environ, check=False
    )


def driver(*words: str) -> subprocess.CompletedProcess:
    return program("-m", "eval.interactions", "--interaction_table", TABLE, *words)


def test_a_table_that_is_not_there_is_one_line(here):
    done = driver("--output", "out")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: there is no interaction table 'table/")
    assert done.stderr.count("\n") == 1
    assert list(here.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("reject", [(), ("--reject_class",)])
def test_experts_of_real_trainings(here, reject):
    prepare = str(ROOT / "launch/prepare_data.py")
    words = ("--backbone", "small_clip", "--pretrained", "builtin", "--output", "table")
    done = program(prepare, "interactions", "--dataset", "emoji", *words)
    assert done.returncode == 0, done.stderr
    words = ("--output", "out", "--seeds", "0", "--ensemble", "2", "--resamples", "50", *reject)
    small = ("--prompt", "none", "--moe_enable", "false", "--max_steps", "2")
    small = (*small, "--global_batch_size", "8")
    done = driver(*words, *small)
    assert done.returncode == 0, done.stderr
    result = json.loads(Path("out/results.json").read_text())
    (section,) = result["sections"]
    names = {row["name"] for row in section["rows"]}
    assert {"baseline", "ensemble", "rus", "learned_gate", "stacking", "oracle"} <= names
    assert ("rus_reject" in names) is bool(reject)
    assert result["failed"] == {}
    again = driver(*words, *small)
    assert again.stdout.count(": kept") == result["num_trainings"]
