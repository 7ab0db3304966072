"""Validation scores during training, on two ranks: they equal the final table."""

from __future__ import annotations

import pytest

from tests.distributed.harness import run_distributed
from tests.distributed.runs import column, train_here, write_recipe

pytestmark = pytest.mark.distributed


def test_scores_while_training_equal_the_final_ones(tmp_path):
    argv = ["--config", write_recipe(tmp_path), "--output_dir", str(tmp_path / "run")]
    argv += ["--max_steps", "4", "--eval_strategy", "steps", "--eval_steps", "2"]
    argv += ["--save_strategy", "no", "--deepspeed", "ds_configs/zero2.json"]
    result = run_distributed(train_here, 2, [argv], timeout_s=200)[0][0]
    found = column(result, "eval_text_missing_accuracy")
    assert [e["step"] for e in result["metrics"] if "eval_mixed_accuracy" in e] == [2, 4]
    final = result["scores"]["models"]["replay"]["text missing"]["accuracy"]
    assert found[-1] == pytest.approx(final)
