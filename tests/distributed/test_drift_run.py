"""A run of two processes that is resumed by its folder, with other settings, and too long ago."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.harness import run_distributed
from tests.distributed.runs import read_run, train_here, write_recipe

pytestmark = pytest.mark.distributed


def resume(folder: str, *words: str) -> str:
    """What a user gets who types these words; "" if the run goes on."""
    import launch.run
    from launch.cli import RecipeParser
    from launch.own_flags import complete
    from mm_moe.errors import MMMoEError

    line = complete(["--output_dir", folder, "--resume_from_checkpoint", "latest", *words])
    parser = RecipeParser()
    try:
        values = parser.namespace(line.argv, recipe=line.recipe)
        launch.run.execute(parser, values, line.argv, recipe=line.recipe)
    except MMMoEError as error:
        return str(error)
    return ""


def lives(rank: int, world_size: int, folder: str) -> list[str]:
    recipe = write_recipe(Path(folder)) if rank == 0 else f"{folder}/recipe.yaml"
    run = f"{folder}/run"
    argv = ["--config", recipe, "--output_dir", run, "--save_steps", "2", "--max_steps", "2"]
    argv += ["--eval_strategy", "no", "--final_evaluation", "false", "--learning_rate", "0.002"]
    argv += ["--hub_token", "hf_abcdefghijklmnopqrstuvwxyz"]
    train_here(rank, world_size, [argv])
    said = [resume(run, "--learning_rate", "0.5"), resume(run, "--max_steps", "4")]
    said.append(resume(run, "--max_steps", "6", "--seed", "7", "--allow_drift", "true"))
    said.append(resume(run, "--config", "emoji_replay", "--max_steps", "8"))
    return said


def test_the_lives_of_a_run(tmp_path):
    both = run_distributed(lives, 2, str(tmp_path), timeout_s=240)
    assert both[0] == both[1]  # every rank refuses, or none
    faster, longer, drifted, another = both[0]
    assert "learning_rate was 0.002, is 0.5" in faster
    assert (longer, drifted) == ("", "")
    assert "belongs to another model" in another  # a recipe that was typed is taken as it stands
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    first, second, third = record["starts"]
    assert [start["from_step"] for start in record["starts"]] == [0, 2, 4]
    assert second["previous"] == "done"
    assert second["changed"] == [
        "max_steps was 2, is 4 (the learning rate follows the longer schedule from here)"
    ]
    assert "seed was 42, is 7" in third["changed"]
    assert first["world_size"] == 2
    assert record["arguments"]["learning_rate"] == 0.002
    assert [entry["step"] for entry in read_run(tmp_path / "run")["metrics"]] == list(range(1, 7))
    assert "hf_abc" not in (tmp_path / "run" / "run.json").read_text()
