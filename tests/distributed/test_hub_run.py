"""A run over two processes is pushed while it trains and at its end, and comes back bit for bit.

The Hub is a local server that speaks its HTTP API; the clients are the real ones.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from launch import export
from mm_moe.checkpoint import store
from mm_moe.errors import CheckpointError
from mm_moe.models.folder import load_model
from tests.distributed.harness import run_distributed
from tests.distributed.runs import train_here, write_recipe
from tests.distributed.test_export import ROOT, probe
from tests.hub_server import TOKEN, HubServer

pytestmark = [pytest.mark.distributed, pytest.mark.faults]

DOWN = """
import sys
sys.modules["deepspeed"] = None
import torch
torch.set_num_threads(1)
import mm_moe.models
from transformers import AutoModel
from mm_moe.models.processing import processors_for
name, place = sys.argv[1:]
batch = torch.load(f"{place}/batch.pt", weights_only=True)
model = AutoModel.from_pretrained(name)
with torch.no_grad():
    torch.save(model(**batch).logits, f"{place}/again.pt")
shape = processors_for(model.config, source=name)["text"](["a cat"])["input_ids"].shape
assert shape[0] == 1, shape
"""


@pytest.fixture(scope="module")
def server():
    with HubServer() as found:
        yield found


def train_with(rank, world_size, environment, argv):
    """One run in this rank, in an environment of its own."""
    os.environ.update(environment)
    os.environ.pop("HF_TOKEN", None)
    return train_here(rank, world_size, [argv])


@pytest.fixture(scope="module")
def run(server, tmp_path_factory):
    """The folder of a run of two steps, saved and offered after each."""
    place = tmp_path_factory.mktemp("hub")
    server.fault("POST .*/commit/", status=503)
    argv = ["--config", write_recipe(place), "--output_dir", str(place / "run")]
    argv += ["--deepspeed", "ds_configs/zero2.json", "--ep_size", "2", "--max_steps", "2"]
    argv += ["--save_steps", "1", "--push_to_hub", "--hub_model_id", "org/run"]
    argv += [f"--hub_token={TOKEN}", "--max_shard_size", "20KB", "--hub_private_repo", "true"]
    argv += ["--report_to", "tensorboard"]
    environment = {**server.environment(), "HF_HOME": str(place / "home")}
    run_distributed(train_with, 2, environment, argv, timeout_s=400)
    return place / "run"


def test_the_hub_shows_the_finished_model(server, run):
    shown = server.files("org/run")
    final = {f.relative_to(run / "final").as_posix(): f for f in (run / "final").rglob("*")}
    assert {name: file.read_bytes() for name, file in final.items()} == {
        name: content for name, content in shown.items() if name != ".gitattributes"
    }
    assert len([name for name in shown if name.startswith("model-0")]) > 3  # shards
    assert {"expert_load.png", "tokenizer.json", "config.json", "README.md"} <= set(shown)
    assert not {store.OPTIMIZER, store.MANIFEST, store.RANKS} & set(shown)
    assert "auto_map" not in json.loads(shown["config.json"])
    assert server.repos["org/run"].messages[-1] == "Finished training"
    assert server.repos["org/run"].private
    done = json.loads((run / "push.json").read_text())
    assert done["state"] == "pushed"
    assert done["commit"] == server.repos["org/run"].at("main")[0]


def test_the_card_on_the_hub(server, run):
    text = server.files("org/run")["README.md"].decode()
    scores = json.loads((run / "scores.json").read_text())
    front = yaml.safe_load(text.split("---\n", 2)[1])
    found = {
        result["dataset"]["config"]: metric["value"]
        for result in front["model-index"][0]["results"]
        for metric in result["metrics"]
        if metric["type"] == scores["metrics"][0]
    }
    expected = scores["models"]["replay"]
    assert found == {name: row[scores["metrics"][0]] for name, row in expected.items()}
    assert "![Load of the experts](expert_load.png)" in text
    assert str(run.parent) not in text


def test_a_fresh_process_downloads_the_same_bits(server, run, tmp_path):
    torch.save(probe(3), tmp_path / "batch.pt")
    environment = {**os.environ, **server.environment()}
    environment |= {"HF_TOKEN": TOKEN, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", DOWN, "org/run", str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = load_model(run / "final").eval()(**probe(3)).logits
    assert torch.equal(torch.load(tmp_path / "again.pt"), expected)


def files_with(text: str, folder: Path) -> list[str]:
    """The files below a folder that hold a text."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return [str(file) for file in files if text.encode() in file.read_bytes()]


def test_the_token_stands_nowhere(server, run):
    assert any(run.rglob("events*"))
    assert files_with(TOKEN, run.parent) == []
    assert not any(TOKEN.encode() in blob for blob in server.blobs.values())
    assert "hub_token" not in json.loads((run / "run.json").read_text())["arguments"]


def test_export_pushes_a_checkpoint_without_what_resumes_it(server, run, monkeypatch, capsys):
    for name, value in {**server.environment(), "HF_TOKEN": TOKEN}.items():
        monkeypatch.setenv(name, value)
    argv = [str(run), "--checkpoint", "latest", "--max_shard_size", "30KB"]
    assert export.main([*argv, "--push_to_hub", "org/other", "--private"]) == 0
    shown = server.files("org/other")
    assert not {store.OPTIMIZER, store.MANIFEST, store.RANKS, store.WEIGHTS} & set(shown)
    assert "Not evaluated" in shown["README.md"].decode()
    assert "pushed to" in capsys.readouterr().out
    assert not list(run.glob(".pushing*"))
    server.fault("POST /api/repos/create", status=403, message=f"no, {TOKEN}")
    with pytest.raises(CheckpointError, match="was refused: the Hub answered 403") as caught:
        export.main([str(run), "--push_to_hub", "org/third"])
    assert TOKEN not in str(caught.value)
    record = json.loads((run / "push.json").read_text())
    assert (record["repo"], record["state"]) == ("org/third", "refused")
    assert record["earlier"][-1]["state"] == "pushed"


def command(*words: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """A real command line of this project."""
    return subprocess.run(
        [sys.executable, *words],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        timeout=500,
    )


@pytest.mark.slow
def test_on_the_real_command_line_a_hub_that_fails_does_not_fail_the_run(tmp_path):
    argv = ["launch/train.py", "--config", write_recipe(tmp_path), "--max_steps", "2"]
    argv += ["--output_dir", str(tmp_path / "run"), "--push_to_hub", "--hub_model_id", "org/run"]
    argv += ["--save_steps", "1", "--hub_token", TOKEN]
    with HubServer() as server:
        environment = {**server.environment(), "HF_HOME": str(tmp_path / "home")}
        server.fault("GET /api/whoami", status=401)
        wrong = command(*argv, environment=environment)
        assert wrong.returncode == 2, wrong.stderr
        assert "does not take this token" in wrong.stderr
        assert not (tmp_path / "run").exists()
        server.fault("POST /api/repos/create", status=403, times=99, message=f"no, {TOKEN}")
        run = command(*argv, environment=environment)
        assert run.returncode == 0, run.stderr
        assert "warning: the push to org/run was refused: the Hub answered 403" in run.stderr
        assert json.loads((tmp_path / "run" / "push.json").read_text())["state"] == "refused"
        server.faults.clear()
        again = ["launch/export.py", str(tmp_path / "run"), "--push_to_hub", "org/run"]
        without = command(*again, environment=environment)
        assert without.returncode == 2
        assert "there is no token" in without.stderr
        done = command(*again, environment={**environment, "HF_TOKEN": TOKEN})
        assert done.returncode == 0, done.stderr
        assert "README.md" in server.files("org/run")
    gone = command(*again, "--hub_timeout_s", "5", environment={**environment, "HF_TOKEN": TOKEN})
    assert gone.returncode == 2
    assert "not done within --hub_timeout_s 5 (before: no connection" in gone.stderr
    said = "".join(r.stdout + r.stderr for r in (wrong, run, without, done, gone))
    assert TOKEN not in said
    assert files_with(TOKEN, tmp_path) == []
