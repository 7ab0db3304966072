"""`run.json`: read, written, and what a resumed run takes from it."""

import json

import pytest

from launch import manifest
from launch.cli import RecipeParser
from launch.manifest import (
    earlier_starts,
    hardware,
    new_start,
    note_end,
    package_versions,
    plain_flags,
    read_manifest,
    settings_without_secrets,
    source_state,
    without_secrets,
    write_manifest,
)
from launch.own_flags import complete
from mm_moe.errors import CheckpointError


def test_a_torn_file_is_told_and_a_missing_one_is_none(tmp_path):
    assert read_manifest(tmp_path) is None
    for text in ('{"arguments": {"se', "", "[1]", "\x00"):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"run.json.*--config"):
            read_manifest(tmp_path)
        assert earlier_starts(tmp_path) == []
        note_end(tmp_path, "done")  # nothing to write it into
        assert (tmp_path / "run.json").read_text() == text


def test_starts_are_listed_with_their_ends(tmp_path):
    starts = [new_start(step=n, world_size=2, ep_size=1, changed=["x"]) for n in (0, 4)]
    write_manifest(tmp_path, {"starts": starts})
    note_end(tmp_path, "status 75 (Preempted)")
    first, second = earlier_starts(tmp_path)
    assert "ended" not in first
    assert second["ended"]["how"] == "status 75 (Preempted)"
    assert (second["from_step"], second["changed"]) == (4, ["x"])
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_no_host_and_no_token(tmp_path):
    import socket

    words = json.dumps([hardware(), package_versions(), source_state()])
    assert socket.gethostname() not in words
    values = RecipeParser().namespace(["--hub_token", "hf_secret"])
    assert "hf_secret" not in json.dumps(plain_flags(values))


def test_no_secret_of_an_address():
    secret = "http://user:swordfish@host/a.csv?sig=hush#x"
    options = json.dumps({"labels": [secret], "b": 1})
    argv = ["--data_dir", secret, f"--zero_shot_data_dir={secret}", "--dataset_options", options]
    kept = [
        plain_flags(RecipeParser().namespace(argv)),
        without_secrets(argv),
        settings_without_secrets({"data_dir": secret, "nested": {"of": [secret, 3, None]}}),
    ]
    words = json.dumps(kept)
    assert not [word for word in ("user:", "swordfish", "hush") if word in words]
    assert kept[0]["data_dir"] == "http://host/a.csv"
    assert json.loads(kept[0]["dataset_options"]) == {"labels": ["http://host/a.csv"], "b": 1}
    assert kept[2]["nested"] == {"of": ["http://host/a.csv", 3, None]}


def test_the_state_of_the_code(monkeypatch):
    said = {"rev-parse": "abc\n", "diff": "", "status": ""}
    monkeypatch.setattr(manifest, "_git", lambda *words: said[words[0]])
    assert source_state() == {"commit": "abc", "dirty": False, "diff_sha256": None}
    said |= {"diff": "+x\n", "status": " M file\n"}
    state = source_state()
    assert state["dirty"]
    assert len(state["diff_sha256"]) == 64
    said["rev-parse"] = ""
    assert source_state()["commit"] == "unknown"


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "a run"
    folder.mkdir()
    command = ["launch/train.py", "--config", "mine.yaml", "--output_dir", "old", "--seed=3"]
    command += ["--num_experts", "4", "8", "--deepspeed", "z.json", "--allow_drift", "true"]
    write_manifest(folder, {"command": command, "recipe": {"flags": {"learning_rate": 0.5}}})
    return folder


def test_a_run_that_is_resumed_by_its_folder_has_its_own_flags(run):
    typed = ["--output_dir", str(run), "--resume_from_checkpoint", "latest", "--seed", "5"]
    line = complete(typed)
    own = ["--config", "mine.yaml", "--num_experts", "4", "8", "--deepspeed", "z.json"]
    assert line.argv == [*own, *typed]
    assert str(run) in line.told
    values = RecipeParser().namespace(line.argv, recipe=line.recipe)  # mine.yaml is not read
    assert (values.learning_rate, values.seed, values.num_experts) == (0.5, 5, [4, 8])
    by_path = complete([f"--resume-from-checkpoint={run}/checkpoint-5"])
    assert by_path.recipe == {"learning_rate": 0.5}


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--resume_from_checkpoint", "latest", "--config", "x"],
        ["--resume_from_checkpoint", "latest", "--config=x"],
    ],
)
def test_a_new_run_and_a_whole_command_line_stand_as_they_are(run, more):
    typed = ["--output_dir", str(run), *more]
    assert complete(typed).argv == typed
    assert complete(typed).recipe is None


def test_folders_without_flags(tmp_path):
    for text in (None, "{}"):
        if text:
            (tmp_path / "run.json").write_text(text)
        typed = ["--output_dir", str(tmp_path), "--resume_from_checkpoint", "auto"]
        assert complete(typed).argv == typed
    assert complete(["--resume_from_checkpoint", "latest"]).told == ""
