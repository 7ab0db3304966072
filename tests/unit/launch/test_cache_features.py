"""Cached features: a head on them has the logits of the frozen backbone, lacking what it lacks."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from launch import prepare_data
from launch.model_config import label_fields
from mm_moe.data.collate import Collator
from mm_moe.data.missing import MissingProtocol
from mm_moe.data.sets.cached_features import CachedFeaturesData
from mm_moe.data.sets.columns import ColumnsData
from mm_moe.errors import ConfigError, DataError
from mm_moe.models.building import build_model
from mm_moe.models.configuration import MultimodalMoEConfig
from mm_moe.models.processing import processors_for
from tests.raw_layouts import jpeg

OPTIONS = {
    "image_column": "picture",
    "text_column": "words",
    "label_column": "kind",
    "id_column": "key",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten rows a split: row 1 has no picture, row 2 no words, row 3 a broken picture."""
    place = tmp_path_factory.mktemp("data")
    for split in ("train", "test"):
        pictures = [jpeg((20 * n, 90, 200 - 10 * n), size=(64, 64)) for n in range(10)]
        pictures[1], pictures[3] = b"", b"no picture"
        words = ["a dog", "two cats on a mat", "", *(f"word {'x ' * n}" for n in range(7))]
        columns = {
            "key": [f"{split}-{n}" for n in range(10)],
            "picture": pictures,
            "words": words,
            "kind": ["pear", "fig"] * 5,
        }
        pq.write_table(pa.table(columns), place / f"{split}.parquet")
    return place


@pytest.fixture(scope="module")
def cached(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("features") / "out"
    flags = ["--dataset", "columns", "--data_dir", str(folder), "--output", str(output)]
    flags += ["--dataset_options", json.dumps(OPTIONS), "--pretrained", "builtin", "--use_cpu"]
    assert prepare_data.main(["features", *flags, "--batch_size", "4"]) == 0
    return CachedFeaturesData(str(output))


def batch_of(source, config, split, missing=None):
    collate = Collator(
        modalities=source.modalities,
        processors=processors_for(config),
        problem_type=source.problem_type,
        num_labels=len(source.label_names),
        missing=missing,
        vectors=source.sequences,
    )
    return collate([source.to_sample(row) for row in source.stream(split)])


def models(source, cached):
    """The frozen backbone with a head, and the same head alone."""
    torch.manual_seed(0)
    common = {"modalities": list(source.modalities), **label_fields(source)}
    whole = build_model(
        MultimodalMoEConfig(backbone="small_clip", **common), pretrained="builtin"
    ).eval()
    settings = {"sequences": {name: dict(about) for name, about in cached.sequences.items()}}
    alone = build_model(
        MultimodalMoEConfig(backbone="features", backbone_config=settings, **common)
    ).eval()
    alone.head.load_state_dict(whole.head.state_dict())
    return whole, alone


@pytest.mark.parametrize("ratio", [0.0, 0.7])
@torch.no_grad()
def test_the_head_alone_has_the_logits_of_the_frozen_backbone(folder, cached, ratio):
    source = ColumnsData(str(folder), **OPTIONS)
    whole, alone = models(source, cached)
    missing = MissingProtocol(dataset=source.name, split="test", kind="both", ratio=ratio)
    there = batch_of(source, whole.config, "test", missing)
    here = batch_of(cached, alone.config, "test", missing)
    assert here.ids == there.ids
    # a broken picture is found out after the mask there, and before it here
    rows = [n for n, name in enumerate(here.ids) if not (ratio and name == "test-3")]
    assert torch.equal(here.present[rows], there.present[rows])
    assert here.labels[rows].tolist() == there.labels[rows].tolist()
    assert torch.allclose(alone(**here).logits[rows], whole(**there).logits[rows], atol=1e-5)


def test_what_is_lacking_stays_lacking_and_the_record_names_the_backbone(cached):
    samples = [cached.to_sample(row) for row in cached.stream("train")]
    assert [set(sample.payload) for sample in samples[:5]] == [
        {"image", "text"},
        {"text"},
        {"image"},
        {"text"},
        {"image", "text"},
    ]
    options = cached.info["options"]
    assert (options["backbone"], options["pretrained"]) == ("small_clip", "builtin")
    assert len(cached.backbone_sha256) == 64
    assert cached.sequences["image"]["std"] == [1.0] * 128  # used as they are


def test_what_is_no_cache_is_refused(tmp_path, folder, cached):
    info = json.loads(Path(cached.data_dir, "dataset_info.json").read_text())
    del info["options"]["backbone_sha256"]
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    for file in Path(cached.data_dir).glob("*.parquet"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(DataError, match="no features of it"):
        CachedFeaturesData(str(tmp_path))
    words = ["features", "--dataset", "emoji", "--output", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match="--pretrained"):
        prepare_data.main(words)
