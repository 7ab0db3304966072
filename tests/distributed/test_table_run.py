"""A run on stored tables is the run on the protocol that they were made by."""

from __future__ import annotations

import json

import pytest

from launch import evaluate_run
from launch.tables import mask_keys
from mm_moe.data.missing import MissingProtocol
from mm_moe.data.sets.emoji import EmojiData
from mm_moe.data.table import table_of
from tests.distributed.harness import run_distributed
from tests.distributed.runs import column, train_here, write_recipe

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_tables_in_training_and_in_the_final_table(tmp_path, capsys):
    source, words = EmojiData(), []
    for split in ("train", "validation"):
        protocol = MissingProtocol(dataset="emoji", split=split, kind="both", ratio=0.9)
        path = tmp_path / f"{split}.json"
        table_of(protocol, ids=mask_keys(source, split), modalities=source.modalities).save(path)
        words.append(str(path))
    shared = ["--config", write_recipe(tmp_path), "--max_steps", "3", "--save_strategy", "no"]
    by_rule, by_table = (tmp_path / name for name in ("rule", "table"))
    commands = [
        [*shared, "--output_dir", str(by_rule)],
        [*shared, "--output_dir", str(by_table), "--missing_table", *words],
    ]
    rule, table = run_distributed(train_here, 2, commands, timeout_s=300)[0]
    assert column(table, "loss") == column(rule, "loss")
    scores = table["scores"]["models"]["replay"]
    assert scores["table"] == rule["scores"]["models"]["replay"]["mixed"]
    record, other = (json.loads((d / "run.json").read_text()) for d in (by_table, by_rule))
    assert record["missing"]["kind"] == "table"
    assert record["missing"]["mask_sha256"] == other["missing"]["mask_sha256"]
    assert record["missing"]["tables"]["validation"]["origin"]["ratio"] == 0.9
    argv = [str(by_table), "--patterns", "table", "both:0.9", "--resamples", "0", "--use_cpu"]
    assert evaluate_run.main(argv) == 0
    again = json.loads((by_table / "evaluation-validation.json").read_text())
    (found,) = again["models"].values()
    assert found["table"] == found["both:0.9"] == scores["table"]
    capsys.readouterr()
