"""Hard routing by the categories of a table through the whole program: two processes equal one."""

from __future__ import annotations

import numpy as np
import pytest

from mm_moe.data.interactions.table import table_of
from mm_moe.data.sets.emoji import EmojiData
from tests.distributed.harness import run_distributed
from tests.distributed.runs import RECIPE, column, train_here, write_recipe

pytestmark = [pytest.mark.distributed, pytest.mark.slow]  # two starts of the whole program


def write_table(path) -> str:
    """Made-up predictions: all four categories occur."""
    source = EmojiData()
    samples = list(source.index("train"))
    labels = np.array([sample.label for sample in samples])
    row = np.arange(len(labels)) % 4
    off = {"image": np.array([0, 0, 1, 1]), "text": np.array([0, 1, 1, 2])}  # R, U, AS, DS
    said = {name: (labels + by[row]) % 9 for name, by in off.items()}
    table = table_of(
        dataset=source.name,
        label_names=source.label_names,
        ids=[sample.id for sample in samples],
        splits=["train"] * len(samples),
        label_N=labels,
        predictions=said,
        probabilities={name: np.eye(9)[codes] for name, codes in said.items()},
        origin={},
    )
    assert set(table.coarse_N.tolist()) == {0, 1, 2, 3}
    table.save(path)
    return str(path)


def test_categories_route_alike_on_one_and_two_processes(tmp_path):
    text = RECIPE.replace("max_steps: 20", "max_steps: 4").replace(
        "save_steps: 10", "save_steps: 9"
    )
    shared = [
        *("--config", write_recipe(tmp_path, text), "--deepspeed", "ds_configs/zero2.json"),
        *("--router", "by_interaction", "--prompt", "none", "--final_evaluation", "false"),
        *("--interaction_table", write_table(tmp_path / "table.parquet"), "--seed", "3"),
    ]
    losses = {}
    for world in (1, 2):
        words = [*shared, "--ep_size", str(world), "--output_dir", str(tmp_path / f"of{world}")]
        result = run_distributed(train_here, world, [words], timeout_s=400)[0][0]
        losses[world] = column(result, "loss")
    assert len(losses[1]) == 4
    assert losses[2] == pytest.approx(losses[1], rel=2e-4)
