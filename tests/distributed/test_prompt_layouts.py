"""Prompts that start from the task's data, or from their towers: the same run on any layout."""

from __future__ import annotations

import json

import pytest

from tests.distributed.harness import run_distributed
from tests.distributed.runs import column, train_here, write_recipe

pytestmark = pytest.mark.distributed
CASES = [
    ("replay", {"initial_samples": 40}),
    ("generative", {"steps": 4, "length": 4}),
    ("rep_code", {"dropout": 0.0, "hidden": 16, "common_width": 16}),
]


def commands(folder, world, cases):
    return [
        [
            *("--config", write_recipe(folder), "--deepspeed", "ds_configs/zero2.json"),
            *("--output_dir", str(folder / f"{name}-{world}-{i}"), "--max_steps", "2"),
            *("--final_evaluation", "false", "--save_strategy", "no", "--ep_size", str(world)),
            *("--prompt", name, "--prompt_config", json.dumps(options)),
        ]
        for i, (name, options) in enumerate(cases)
    ]


def test_one_and_two_processes_take_the_same_steps(tmp_path):
    one, two = (
        run_distributed(train_here, world, commands(tmp_path, world, cases), timeout_s=200)[0]
        for world, cases in ((1, [*CASES, ("replay", {})]), (2, CASES))
    )
    for (name, _), a, b in zip(CASES, one[:3], two, strict=True):
        assert len(column(a, "loss")) == 2
        assert column(a, "loss") == pytest.approx(column(b, "loss"), rel=1e-4), name
        assert column(a, "grad_norm") == pytest.approx(column(b, "grad_norm"), rel=1e-3), name
    # the task's own samples moved the start
    assert column(one[0], "loss") != pytest.approx(column(one[3], "loss"), rel=1e-4)
