"""What `launch/export.py` and `launch/evaluate_run.py` refuse, with nothing left on disk."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from refusals import file, refused

from launch import check_runs, evaluate_run, export
from mm_moe.checkpoint import store
from mm_moe.errors import CheckpointError, ConfigError, DataError


def published(run: str) -> None:
    """A run with a model that is complete enough to be copied."""
    Path(run, "final").mkdir(parents=True)
    Path(run, "final", store.WEIGHTS).write_bytes(b"weights")


def test_what_export_refuses(here):
    published("run")
    assert "nothing to do: give --output" in refused(ConfigError, "run", program=export)
    said = refused(CheckpointError, "absent", "--output", "copy", program=export)
    assert "'absent' has no final/ model" in said
    assert "--checkpoint latest" in said
    Path("taken").mkdir()
    file("taken/notes.txt", "mine")
    said = refused(ConfigError, "run", "--output", "taken", program=export)
    assert "--output 'taken' is not empty" in said
    said = refused(ConfigError, "run", "--output", "taken/notes.txt", program=export)
    assert "--output 'taken/notes.txt'" in said
    argv = ("run", "--output", "copy", "--push_to_hub", "a b")
    assert "write ORG/NAME" in refused(ConfigError, *argv, program=export)
    argv = ("run", "--output", "copy", "--checkpoint")
    assert "no good checkpoint" in refused(CheckpointError, *argv, "latest", program=export)
    said = refused(CheckpointError, *argv, "checkpoint-7", program=export)
    assert "run/checkpoint-7' does not exist" in said


def test_what_evaluation_refuses(here):
    said = refused(CheckpointError, "absent", program=evaluate_run)
    assert "'absent' is no run" in said
    Path("run").mkdir()
    for text in ("{", "[]", "{}"):
        file("run/run.json", text)
        assert "no readable run.json" in refused(CheckpointError, "run", program=evaluate_run)
    arguments = {"dataset": "emoji", "data_dir": None, "dataset_options": None}
    arguments |= {"test_split": "test"}
    file("run/run.json", json.dumps({"arguments": arguments}))
    assert "has no final/" in refused(CheckpointError, "run", program=evaluate_run)
    argv = ("run", "--checkpoint", "checkpoint-7")
    assert "does not exist" in refused(CheckpointError, *argv, program=evaluate_run)
    published("run")
    said = refused(DataError, "run", "--split", "tset", program=evaluate_run)
    assert "'tset'" in said
    assert "test" in said
    assert "--batch_size" in refused(ConfigError, "run", "--batch_size", "0", program=evaluate_run)
    argv = ("run", "--patterns", "complete")
    assert "'text:2'" in refused(ConfigError, *argv, "text:2", program=evaluate_run)
    assert "'sound'" in refused(ConfigError, *argv, "sound:1", program=evaluate_run)
    assert "--resamples -1" in refused(
        ConfigError, "run", "--resamples", "-1", program=evaluate_run
    )


@pytest.mark.parametrize("text", ["", "{", "7", '[["--prompt", 3]]'])
def test_what_the_check_of_runs_refuses(here, monkeypatch, text):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    assert "standard input is no JSON list" in refused(ConfigError, program=check_runs)


def test_runs_are_checked_without_a_trace(here, monkeypatch, capsys):
    runs = [["--prompt", "none", "--max_steps", "3"], ["--prompt", "replay"]]
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(runs)))
    assert check_runs.main([]) == 0
    none, replay = json.loads(capsys.readouterr().out)["runs"]
    assert (none["arguments"]["prompt_config"], none["arguments"]["max_steps"]) == (None, 3)
    assert json.loads(replay["arguments"]["prompt_config"]) == {"length": 2}  # the recipe's
    assert none["data"]["modalities"] == ["image", "text"]
    assert none["data"]["splits"]["test"] == 658
    assert "hub_token" not in none["arguments"]
    monkeypatch.setattr("sys.stdin", io.StringIO('[["--prompt", "repaly"]]'))
    assert "did you mean replay" in refused(ConfigError, program=check_runs)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("program", [export, evaluate_run])
def test_flags_that_the_other_programs_do_not_know(here, program):
    assert "--sylte" in refused(ConfigError, "run", "--sylte", "x", program=program)
    assert "run" in refused(ConfigError, program=program)
