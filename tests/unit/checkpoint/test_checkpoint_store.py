"""Checkpoint folders on disk: what is damaged is never taken for good."""

import json

import pytest
import torch
from safetensors.torch import save_file

from mm_moe.checkpoint import store
from mm_moe.errors import CheckpointError


def checkpoint(run, step: int):
    """A small folder with a manifest, published under its name."""
    aside = run / f".saving-checkpoint-{step}"
    (aside / "processor").mkdir(parents=True)
    (aside / "weights.bin").write_bytes(bytes(range(100)))
    (aside / "processor" / "vocab.txt").write_text("a\nb\n")
    store.write_manifest(aside, step)
    folder = run / f"checkpoint-{step}"
    store.publish(aside, folder)
    return folder


def refusal(folder) -> str:
    with pytest.raises(CheckpointError) as caught:
        store.verify(folder)
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_the_manifest_lists_every_file_with_size_and_digest(tmp_path):
    folder = checkpoint(tmp_path, 7)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) == {"weights.bin", "processor/vocab.txt"}
    assert manifest["files"]["processor/vocab.txt"] == {
        "bytes": 4,
        # printf 'a\nb\n' | sha256sum
        "sha256": "911169ddaaf146aff539f58c26c489af3b892dff0fe283c1c264c65ae5aa59a2",
    }
    assert store.verify(folder) == 7
    assert not (tmp_path / ".saving-checkpoint-7").exists()


def test_a_truncated_file(tmp_path):
    folder = checkpoint(tmp_path, 7)
    (folder / "weights.bin").write_bytes(bytes(range(99)))
    said = refusal(folder)
    assert "weights.bin" in said
    assert "earlier checkpoint-N" in said


def test_one_flipped_bit(tmp_path):
    folder = checkpoint(tmp_path, 7)
    content = bytearray((folder / "weights.bin").read_bytes())
    content[50] ^= 1
    (folder / "weights.bin").write_bytes(content)
    assert "weights.bin differs" in refusal(folder)


def test_a_missing_file(tmp_path):
    folder = checkpoint(tmp_path, 7)
    (folder / "processor" / "vocab.txt").unlink()
    assert "processor/vocab.txt is missing" in refusal(folder)


@pytest.mark.parametrize("manifest", [None, "", '{"step": 7', "[]", '{"step": 7}', '{"files": {}}'])
def test_a_manifest_that_says_nothing(tmp_path, manifest):
    folder = checkpoint(tmp_path, 7)
    if manifest is None:
        (folder / "manifest.json").unlink()
    else:
        (folder / "manifest.json").write_text(manifest)
    assert "incomplete: no readable manifest.json" in refusal(folder)


def test_a_folder_that_is_not_there(tmp_path):
    assert "does not exist" in refusal(tmp_path / "checkpoint-1")


def test_publishing_replaces_an_older_folder(tmp_path):
    (checkpoint(tmp_path, 7) / "stray").write_text("")
    assert not (checkpoint(tmp_path, 7) / "stray").exists()


def test_checkpoints_in_the_order_of_steps_and_nothing_else(tmp_path):
    for step in (100, 20, 3):
        checkpoint(tmp_path, step)
    for name in (".saving-checkpoint-5", "checkpoint-x", "checkpoint-7-old", "final"):
        (tmp_path / name).mkdir()
    found = [path.name for path in store.checkpoints(tmp_path)]
    assert found == ["checkpoint-3", "checkpoint-20", "checkpoint-100"]


@pytest.mark.parametrize("wanted", ["latest", "Latest", "true", "True"])
def test_latest_skips_what_is_damaged(tmp_path, wanted):
    for step in (3, 20, 100):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-100" / "weights.bin").write_bytes(b"")
    assert store.find(tmp_path, wanted) == tmp_path / "checkpoint-20"


def test_nothing_good_is_told_with_every_reason(tmp_path):
    with pytest.raises(CheckpointError, match="no good checkpoint"):
        store.find(tmp_path, "latest")
    for step in (3, 20):
        (checkpoint(tmp_path, step) / "weights.bin").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-20.*missing.*checkpoint-3.*missing"):
        store.find(tmp_path, "latest")


def test_a_named_checkpoint_is_never_replaced_by_another(tmp_path):
    checkpoint(tmp_path, 3)
    named = checkpoint(tmp_path, 20)
    assert store.find(tmp_path, str(named)) == named
    (named / "weights.bin").unlink()
    with pytest.raises(CheckpointError, match="checkpoint-20"):
        store.find(tmp_path, str(named))


@pytest.mark.parametrize(("keep", "left"), [(2, [20, 100]), (5, [3, 20, 100]), (0, [3, 20, 100])])
def test_prune_drops_the_oldest(tmp_path, keep, left):
    for step in (100, 20, 3):
        checkpoint(tmp_path, step)
    (tmp_path / "final").mkdir()
    store.prune(tmp_path, keep)
    assert [int(p.name.split("-")[1]) for p in store.checkpoints(tmp_path)] == left
    store.prune(tmp_path, None)
    assert (tmp_path / "final").is_dir()


def test_the_reader_gives_one_tensor_at_a_time(tmp_path):
    save_file({"a": torch.arange(3), "b": torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    read = store.reader(tmp_path / "x.safetensors")
    assert read("a").tolist() == [0, 1, 2]
    with pytest.raises(KeyError):
        read("c")


def test_what_is_no_safetensors_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent\.safetensors"):
        store.reader(tmp_path / "absent.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"12345678junk")
    with pytest.raises(CheckpointError, match="cannot be read"):
        store.reader(tmp_path / "bad.safetensors")


@pytest.mark.parametrize("text", [None, "", "checkpoint-x", "checkpoint-9", "../checkpoint-3"])
def test_a_useless_latest_is_told_and_not_believed(tmp_path, text):
    for step in (3, 20):
        checkpoint(tmp_path, step)
    if text is not None:
        (tmp_path / "latest").write_text(text)
    told = []
    assert store.find(tmp_path, "latest", tell=told.append) == tmp_path / "checkpoint-20"
    assert len(told) == 1
    assert "latest" in told[0] or "checkpoint-9" in told[0]


def test_latest_wins_over_a_higher_step_and_a_damaged_one_is_named(tmp_path):
    for step in (3, 20, 100):
        checkpoint(tmp_path, step)
    store.point_to(tmp_path / "checkpoint-20")
    assert store.find(tmp_path, "latest") == tmp_path / "checkpoint-20"
    (tmp_path / "checkpoint-20" / "weights.bin").write_bytes(b"")
    told = []
    assert store.find(tmp_path, "latest", tell=told.append) == tmp_path / "checkpoint-100"
    assert len(told) == 1
    assert "weights.bin differs" in told[0]
    assert "checkpoint-100 is taken" in told[0]


@pytest.mark.parametrize("dies", ["before", "between", "after"])
def test_replacing_a_checkpoint_never_loses_it(tmp_path, dies):
    checkpoint(tmp_path, 7)
    aside, final = tmp_path / ".saving-checkpoint-7", tmp_path / "checkpoint-7"
    aside.mkdir()
    if dies != "before":
        final.rename(tmp_path / ".old-checkpoint-7")
    if dies == "after":
        (tmp_path / ".old-checkpoint-7" / store.MANIFEST).rename(aside / store.MANIFEST)
        aside.rename(final)
    store.sweep(tmp_path)
    assert final.is_dir()
    assert (dies == "after") or store.verify(final) == 7
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-7"]


def test_prune_deletes_nothing_beside_a_damaged_newest(tmp_path):
    for step in (3, 20):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-20" / "weights.bin").write_bytes(bytes(100))
    with pytest.raises(CheckpointError, match=r"checkpoint-20.*weights\.bin differs"):
        store.prune(tmp_path, 1)
    assert store.verify(tmp_path / "checkpoint-3") == 3


def test_prune_leaves_the_line_that_was_left_alone(tmp_path):
    for step in (3, 20, 100):
        checkpoint(tmp_path, step)
    store.prune(tmp_path, 1, newest=tmp_path / "checkpoint-20")
    assert [path.name for path in store.checkpoints(tmp_path)] == [
        "checkpoint-20",
        "checkpoint-100",
    ]


def test_every_flipped_byte_is_found(tmp_path):
    folder = checkpoint(tmp_path, 7)
    for file in (folder / "weights.bin", folder / "processor" / "vocab.txt"):
        good = file.read_bytes()
        for place in range(len(good)):
            file.write_bytes(good[:place] + bytes([good[place] ^ 0x10]) + good[place + 1 :])
            assert file.name in refusal(folder)
        file.write_bytes(good)
    assert store.verify(folder) == 7
