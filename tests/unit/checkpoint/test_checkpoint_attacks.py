"""Checkpoint folders that nobody wrote that way: refused in a line, and never followed outside."""

import json
import os

import pytest

from mm_moe.checkpoint import store
from mm_moe.errors import CheckpointError

pytestmark = pytest.mark.faults


def checkpoint(run, step: int, **more):
    """A published folder with everything that a resume reads."""
    aside = run / f".saving-checkpoint-{step}"
    aside.mkdir(parents=True)
    for name in (store.WEIGHTS, *store.RESUMED):
        (aside / name).write_text(f"{name} of step {step}")
    store.write_manifest(aside, step, **more)
    store.publish(aside, run / f"checkpoint-{step}")
    return run / f"checkpoint-{step}"


def rewrite(folder, **fields) -> None:
    """Change fields of a manifest."""
    file = folder / store.MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def refusal(folder, **more) -> str:
    with pytest.raises(CheckpointError) as caught:
        store.verify(folder, needed=store.RESUMED, **more)
    said = str(caught.value)
    assert str(folder) in said
    assert "\n" not in said
    return said


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/hostname", "a/../../secret", "a\0b", "n" * 300]
)
def test_a_manifest_names_nothing_outside(name, tmp_path):
    folder = checkpoint(tmp_path, 3)
    (tmp_path / "secret").write_text("s")
    rewrite(folder, files={name: {"bytes": 1, "sha256": store.digest(tmp_path / "secret")}})
    assert store.MANIFEST in refusal(folder) or "cannot be read" in refusal(folder)


@pytest.mark.parametrize(
    "text",
    [
        '{"format": 2, "step": 1e999, "files": {}}',
        '{"format": 2, "step": ' + "9" * 5000 + ', "files": {}}',
        '{"format": 2, "step": 3, "files": {"a": {"bytes": 1e999, "sha256": ""}}}',
        '{"format": 2, "step": 3, "files": {"a": {"bytes": NaN, "sha256": ""}}}',
        "[" * 100_000,
        '{"format": 2, "step": 3, "files": [1]}',
        "\udcff\x00",
    ],
)
def test_a_manifest_that_nobody_wrote(text, tmp_path):
    folder = checkpoint(tmp_path, 3)
    (folder / store.MANIFEST).write_text(text, errors="surrogateescape")
    assert "no readable manifest.json" in refusal(folder)


@pytest.mark.parametrize("name", [store.WEIGHTS, *store.RESUMED])
def test_each_file_flipped_truncated_missing_and_unlisted(name, tmp_path):
    folder = checkpoint(tmp_path, 3)
    file, whole = folder / name, (folder / name).read_bytes()
    file.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert f"{name} differs" in refusal(folder)
    file.write_bytes(whole[:-1])
    assert f"{name} differs" in refusal(folder)
    file.unlink()
    assert f"{name} is missing" in refusal(folder)
    file.mkdir()
    assert f"{name} is missing" in refusal(folder)
    file.rmdir()
    files = json.loads((folder / store.MANIFEST).read_text())["files"]
    files.pop(name)
    rewrite(folder, files=files)
    if name != store.WEIGHTS:  # which may stand in several files
        assert f"lists no {name}" in refusal(folder)
    file.write_bytes(whole)
    assert name in refusal(folder)


def test_a_file_to_load_that_the_manifest_does_not_know(tmp_path):
    folder = checkpoint(tmp_path, 3)
    (folder / "notes.txt").write_text("mine")
    assert store.verify(folder) == 3
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"")
    assert "model-00001-of-00002.safetensors is not in its manifest" in refusal(folder)


def test_a_file_that_the_disk_does_not_give(tmp_path, monkeypatch):
    checkpoint(tmp_path, 3)
    bad, inner = checkpoint(tmp_path, 6) / store.OPTIMIZER, store.digest

    def digest(file):
        if file == bad:
            raise OSError(5, os.strerror(5))
        return inner(file)

    monkeypatch.setattr(store, "digest", digest)
    told: list[str] = []
    assert store.find(tmp_path, "latest", tell=told.append) == tmp_path / "checkpoint-3"
    assert "optimizer.safetensors cannot be read (Input/output error)" in " ".join(told)


def test_a_checkpoint_of_another_run_is_passed_over(tmp_path):
    ours, theirs = checkpoint(tmp_path, 3, run_id="ours"), checkpoint(tmp_path, 6, run_id="theirs")
    assert "belongs to another run" in refusal(theirs, run_id="ours")
    told: list[str] = []
    assert store.find(tmp_path, "latest", tell=told.append, run_id="ours") == ours
    assert "checkpoint-6" in " ".join(told)
    with pytest.raises(CheckpointError, match="belongs to another run"):
        store.find(tmp_path, str(theirs), run_id="ours")
    nameless = checkpoint(tmp_path, 9)
    assert store.find(tmp_path, "latest", run_id="ours") == nameless
    assert store.find(tmp_path, str(theirs)) == theirs  # of a run without an id


@pytest.mark.parametrize(
    "text", ["checkpoint-" + "9" * 300, "/tmp", "../x/checkpoint-3", "checkpoint-٣", "\0" * 2_000]
)
def test_a_latest_that_nobody_wrote(text, tmp_path):
    good = checkpoint(tmp_path, 3)
    (tmp_path / store.LATEST).write_text(text, encoding="utf-8")
    assert store.find(tmp_path, "latest") == store.last_saved(tmp_path) == good


def test_the_last_saved_is_what_stands(tmp_path):
    assert store.last_saved(tmp_path) is None
    for step in (3, 6):
        store.point_to(checkpoint(tmp_path, step))
    store.point_to(tmp_path / "checkpoint-3")
    assert store.last_saved(tmp_path) == tmp_path / "checkpoint-3"
    store.discard(tmp_path / "checkpoint-3")
    assert store.last_saved(tmp_path) == tmp_path / "checkpoint-6"


def test_a_link_is_removed_and_what_it_leads_to_stays(tmp_path):
    run, elsewhere = tmp_path / "run", checkpoint(tmp_path / "elsewhere", 3)
    run.mkdir()
    (run / "checkpoint-3").symlink_to(elsewhere)
    assert store.find(run, "latest") == run / "checkpoint-3"
    checkpoint(run, 3)  # published in its place
    assert not (run / "checkpoint-3").is_symlink()
    (run / "checkpoint-1").symlink_to(elsewhere)
    (run / "checkpoint-2").symlink_to(tmp_path / "nowhere")
    store.prune(run, 1)
    (run / ".saving-x").symlink_to(elsewhere)
    (run / ".gone-x").write_text("")
    store.sweep(run)
    assert [path.name for path in run.iterdir()] == ["checkpoint-3"]
    assert store.verify(elsewhere) == 3
