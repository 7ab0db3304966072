"""A picture that does not decode: counted, named, taken as missing, and the run goes on."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from tests.distributed.harness import run_distributed
from tests.distributed.runs import train_here

pytestmark = pytest.mark.distributed

RECIPE = """\
dataset: columns
dataset_options: {image_column: image, text_column: text, label_column: label, id_column: key}
backbone: small_clip
pretrained: none
backbone_config: {patch_size: 32, num_blocks: 2, width: 16, num_heads: 2, hidden: 16}
moe_layers_idx: [1]
prompt: missing_aware
global_batch_size: 4
shuffle_buffer: 0
max_steps: 3
save_strategy: "no"
logging_steps: 1
"""
BROKEN = ("train-1", "train-6", "test-2")


def write_run(folder) -> list[str]:
    """Twelve pictures with names, three of them broken; returns the flags of a run on them."""
    for split, count in (("train", 8), ("test", 4)):
        rows = []
        for index in range(count):
            key = f"{split}-{index}"
            Image.new("RGB", (8, 8), (index, 90, 9)).save(folder / f"{key}.png")
            if key in BROKEN:
                (folder / f"{key}.png").write_bytes(b"\x89PNG and then nothing")
            row = {"key": key, "image": f"{key}.png", "text": "word", "label": "ab"[index % 2]}
            rows.append(json.dumps(row))
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    (folder / "recipe.yaml").write_text(RECIPE)
    return ["--config", str(folder / "recipe.yaml"), "--data_dir", str(folder)]


def test_the_run_goes_on_and_names_what_it_met(tmp_path):
    argv = [*write_run(tmp_path), "--output_dir", str(tmp_path / "run")]
    result = run_distributed(train_here, 1, [argv])[0][0]
    assert [entry["step"] for entry in result["metrics"]] == [1, 2, 3]
    assert result["scores"]["num_rows"]["complete"] == 4
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert sorted(record["bad_samples"]) == sorted(BROKEN)
