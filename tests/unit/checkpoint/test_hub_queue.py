"""Pushes beside the training: it never waits, the newest wins, and push.json says how it ended."""

import json
import shutil

import pytest

from mm_moe.checkpoint.hub import HubTarget
from mm_moe.checkpoint.hub_queue import PushQueue
from mm_moe.checkpoint.hub_stage import put, stage
from tests.hub_server import TOKEN

pytestmark = pytest.mark.faults
TARGET = HubTarget("org/model", token=TOKEN, waits_s=(0.0,), timeout_s=120)
CARD = "---\nlicense: other\n---\n"
RESUME = ("optimizer.safetensors", "trainer_state.json", "progress.json", "manifest.json")


def checkpoint(run, step, *, more=()):
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text(f"weights of step {step}")
    for name in (*RESUME, "ranks.pt", *more):
        (folder / name).write_text(f"{name} {step}")
    return folder


def queue_of(run, **options):
    return PushQueue(run, TARGET, prepare=lambda to: put(to, "README.md", CARD), **options)


def record(run):
    return json.loads((run / "push.json").read_text())


def staged(run):
    return sorted(path.name for path in run.glob(".pushing*"))


def test_the_newest_wins_and_training_may_prune(server, tmp_path):
    queue = queue_of(tmp_path)
    server.fault("POST .*/commit/", hold=True)
    for step in (1, 2, 3):
        folder = checkpoint(tmp_path, step)
        queue.offer(folder, step=step)
        shutil.rmtree(folder)
        if step == 1:
            server.wait_for("/commit/")
    assert staged(tmp_path) == [".pushing-1", ".pushing-3"]
    assert record(tmp_path)["state"] == "pushing"
    server.released.set()
    assert queue.idle(120)
    assert server.repos["org/model"].messages == ["Step 1", "Step 3"]
    shown = server.files("org/model")
    assert sorted(shown) == [".gitattributes", "README.md", "model.safetensors"]
    assert shown["model.safetensors"] == b"weights of step 3"
    found = record(tmp_path)
    assert (found["step"], found["state"], found["tries"], found["files"]) == (3, "pushed", 1, 2)
    assert found["commit"] == server.repos["org/model"].at("main")[0]
    assert [(entry["step"], entry["state"]) for entry in found["earlier"]] == [(1, "pushed")]
    assert staged(tmp_path) == []
    queue.close()


def test_the_end_does_not_wait_for_an_upload_under_way(server, tmp_path):
    queue = queue_of(tmp_path)
    server.fault("POST .*/preupload/", hold=True)
    queue.offer(checkpoint(tmp_path, 1), step=1)
    server.wait_for("/preupload/")
    queue.offer(checkpoint(tmp_path, 2), step=2)
    final = tmp_path / "final"
    final.mkdir()
    (final / "README.md").write_text(CARD)
    (final / "model.safetensors").write_text("the end")
    result = queue.finish(final, message="done")
    assert result.state == "pushed"
    assert server.repos["org/model"].messages == ["done"]
    assert server.files("org/model")["model.safetensors"] == b"the end"
    found = record(tmp_path)
    assert (found["step"], found["state"]) == (None, "pushed")
    assert [(entry["step"], entry["state"]) for entry in found["earlier"]] == [(1, "failed")]
    assert staged(tmp_path) == []


def test_a_push_that_fails_is_said_and_the_next_one_tried(server, tmp_path, caplog):
    queue = queue_of(tmp_path)
    server.fault("POST /api/repos/create", status=403, message=f"no, {TOKEN}")
    queue.offer(checkpoint(tmp_path, 1), step=1)
    assert queue.idle(120)
    assert record(tmp_path)["state"] == "refused"
    assert "the push of step 1 to org/model was refused" in caplog.text
    assert "Training goes on." in caplog.text
    queue.offer(checkpoint(tmp_path, 2), step=2)
    assert queue.idle(120)
    assert record(tmp_path)["state"] == "pushed"
    queue.close()
    everything = caplog.text + (tmp_path / "push.json").read_text()
    assert TOKEN not in everything


@pytest.mark.slow
def test_the_newest_checkpoint_is_kept_whole_in_the_repository(server, tmp_path):
    queue = queue_of(tmp_path, with_state=True)
    for step, more in ((1, ["part-2"]), (2, [])):
        folder = checkpoint(tmp_path, step, more=more)
        queue.offer(folder, step=step)
        assert queue.idle(120)
    shown = server.files("org/model")
    kept = {name[16:]: data for name, data in shown.items() if name.startswith("last-checkpoint/")}
    assert kept == {file.name: file.read_bytes() for file in folder.iterdir()}
    assert "optimizer.safetensors" not in shown
    queue.close()


def test_what_a_killed_run_left_is_removed_and_its_record_kept(tmp_path):
    (tmp_path / ".pushing-7").mkdir()
    (tmp_path / "push.json").write_text('{"state": "pushing", "step": 7, "earlier": [{"step": 5}]}')
    queue = queue_of(tmp_path)
    assert staged(tmp_path) == []
    assert [entry["step"] for entry in queue.record.earlier] == [5, 7]
    queue.close()


def test_a_checkpoint_that_is_gone_is_passed_over(tmp_path, caplog):
    queue = queue_of(tmp_path)
    queue.offer(tmp_path / "checkpoint-9", step=9)
    assert "the model of step 9 is not pushed" in caplog.text
    assert staged(tmp_path) == []
    assert queue.idle(0)


def test_collected_files_are_links_and_new_ones_are_not_the_sources(tmp_path):
    source = checkpoint(tmp_path, 1)
    stage(source, tmp_path / "copy")
    weights = [place / "model.safetensors" for place in (source, tmp_path / "copy")]
    assert weights[0].samefile(weights[1])
    put(tmp_path / "copy", "model.safetensors", "other")
    assert weights[0].read_text() == "weights of step 1"
    stage(source, tmp_path / "copy", with_state=True)
    assert sorted(f.name for f in (tmp_path / "copy").iterdir()) == sorted(
        f.name for f in source.iterdir()
    )
