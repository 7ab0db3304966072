"""The first losses of the default recipe, stored: a change that should not move a loss does not.

After a change that is meant to move them, write the new ones and say why in CHANGELOG.md:

    MM_MOE_WRITE_GOLDEN=1 pytest tests/golden
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from launch.cli import DEFAULT_RECIPE
from tests.distributed.harness import run_distributed
from tests.distributed.runs import column, train_here

GOLDEN = Path(__file__).parent / "emoji_replay.json"
STEPS = 6


@pytest.mark.distributed
def test_the_default_recipe_starts_with_its_golden_losses(tmp_path):
    argv = ["--config", DEFAULT_RECIPE, "--output_dir", str(tmp_path / "run")]
    argv += ["--max_steps", str(STEPS), "--logging_steps", "1", "--save_strategy", "no"]
    argv += ["--final_evaluation", "false", "--lr_scheduler_type", "constant"]
    result = run_distributed(train_here, 1, [argv], timeout_s=200)[0][0]
    found = {key: column(result, key) for key in ("loss", "grad_norm")}
    if os.environ.get("MM_MOE_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n")
    golden = json.loads(GOLDEN.read_text())
    assert len(found["loss"]) == STEPS
    for key, values in golden.items():
        assert found[key] == pytest.approx(values, rel=5e-3), key
