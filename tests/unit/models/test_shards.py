"""Weights in several files are the same model for every reader; a lost or strange file is told."""

import json

import pytest
import torch
from transformers import AutoModel

from mm_moe.checkpoint import store
from mm_moe.errors import CheckpointError, ConfigError
from mm_moe.models import shards
from mm_moe.models.folder import load_model
from mm_moe.models.mismatch import check_folder
from tests.unit.models.test_folder import trained_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One model, in one file and in several."""
    place = tmp_path_factory.mktemp("shards")
    model = trained_model(prompt="replay")
    model.save_pretrained(place / "whole")
    (place / "parts").mkdir()
    (place / "parts" / "config.json").write_bytes((place / "whole" / "config.json").read_bytes())
    shards.write_shards(place / "whole", place / "parts", max_shard_size="20KB")
    return place


def test_every_reader_finds_the_same_bits(folders):
    whole, parts = folders / "whole", folders / "parts"
    files = shards.weight_files(parts)
    assert len(files) > 3
    assert [file.name for file in shards.weight_files(whole)] == ["model.safetensors"]
    assert not (parts / shards.WEIGHTS).exists()
    check_folder(parts)
    expected = load_model(whole).state_dict()
    for found in (load_model(parts), AutoModel.from_pretrained(parts)):
        assert all(torch.equal(tensor, expected[k]) for k, tensor in found.state_dict().items())
    read = store.reader(parts / store.WEIGHTS)  # as a resumed run asks for it
    assert all(torch.equal(read(name), tensor) for name, tensor in expected.items())
    with pytest.raises(KeyError):
        read("stray")


def copy_of(folder, target):
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_a_shard_that_is_gone_is_named(folders, tmp_path):
    broken = copy_of(folders / "parts", tmp_path / "broken")
    lost = shards.weight_files(broken)[1]
    lost.unlink()
    for look in (check_folder, lambda folder: store.reader(folder / store.WEIGHTS)):
        with pytest.raises(CheckpointError, match=f"names {lost.name}, which is missing"):
            look(broken)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("{", "no readable index"),
        ('{"weight_map": 3}', "no readable index"),
        ('{"weight_map": {}}', "of its own folder"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "of its own folder"),
    ],
)
def test_an_index_that_cannot_be_right(folders, tmp_path, index, said):
    broken = copy_of(folders / "parts", tmp_path / "broken")
    (broken / shards.INDEX).write_text(index)
    with pytest.raises(CheckpointError, match=said):
        check_folder(broken)


def test_a_shard_with_a_tensor_too_few_is_named(folders, tmp_path):
    broken = copy_of(folders / "parts", tmp_path / "broken")
    index = json.loads((broken / shards.INDEX).read_text())
    gone = shards.weight_files(broken)[0].name
    kept = {name: file for name, file in index["weight_map"].items() if file != gone}
    (broken / shards.INDEX).write_text(json.dumps({"weight_map": kept}))
    with pytest.raises(CheckpointError, match="has no tensor"):
        check_folder(broken)


@pytest.mark.parametrize("size", ["5", "GB", "-1GB", "0GB", "1.5GB", "five"])
def test_a_size_that_is_none(size):
    with pytest.raises(ConfigError, match="--max_shard_size"):
        shards.check_size("max_shard_size", size)
    assert shards.check_size("max_shard_size", " 200MB ") == "200MB"
