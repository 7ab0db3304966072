"""Three feature sequences, from the raw pickle to scores: one curve on 1 and 2 processes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from launch import evaluate_run, prepare_data
from mm_moe.registry import PROMPTS
from tests import raw_layouts
from tests.distributed.harness import run_distributed
from tests.distributed.runs import column, train_here, write_recipe

pytestmark = pytest.mark.distributed
RECIPE = """\
# A run of seconds.
dataset: cmu_mosi
backbone: sequences
pretrained: none
backbone_config: {width: 16, num_blocks: 2, num_heads: 2, hidden: 24, projection: 8}
missing_type: subset
missing_ratio: 0.8
moe_layers_idx: [0, 1]
num_experts: 4
prompt: missing_aware
max_steps: 8
global_batch_size: 4
learning_rate: 3.0e-3
logging_steps: 1
save_strategy: "no"
"""


def test_mosi_from_the_pickle_to_the_table(tmp_path):
    raw, data = raw_layouts.cmu_mosi(tmp_path / "raw"), tmp_path / "data"
    prepare_data.main(["cmu_mosi", "--source", str(raw), "--output", str(data)])
    words = ["--config", write_recipe(tmp_path, RECIPE), "--data_dir", str(data)]
    folders = [tmp_path / "one", tmp_path / "two"]
    curves = []
    for world_size, folder in enumerate(folders, start=1):
        argv = [*words, "--output_dir", str(folder), "--ep_size", str(world_size)]
        found = run_distributed(train_here, world_size, [argv], timeout_s=300)[0][0]
        curves.append(column(found, "loss"))
    assert len(curves[0]) == 8
    assert np.allclose(curves[0], curves[1], rtol=1e-4)
    scores = json.loads((folders[1] / "scores.json").read_text())
    assert scores["metrics"][0] == "mae"
    assert {"acc7", "acc2", "f1"} <= set(scores["metrics"])
    assert len(scores["conditions"]) == 1 + 6 + 1  # complete, every set short of all, mixed
    assert evaluate_run.main([str(folders[1])]) == 0
    again = json.loads((folders[1] / "evaluation-test.json").read_text())
    for condition, metrics in scores["models"]["missing_aware"].items():
        assert again["models"]["missing_aware"][condition]["mae"] == pytest.approx(
            metrics["mae"], abs=1e-5
        )


def test_every_prompt_edits_towers_of_sequences(tmp_path):
    """Zero, one or two of three sequences missing."""
    import torch

    from mm_moe.models import MultimodalMoEConfig, MultimodalMoEModel

    sequences = {
        name: {"width": width, "length": raw_layouts.LENGTHS[name]}
        for name, width in raw_layouts.WIDTHS.items()
    }
    present = torch.tensor([[n >> m & 1 for m in range(3)] for n in range(1, 8)]).bool()
    inputs = {}
    for m, (name, about) in enumerate(sequences.items()):
        rows = int(present[:, m].sum())
        values = torch.randn(rows, about["length"], about["width"])
        inputs[name] = {"values": values, "mask": torch.ones(values.shape[:2], dtype=torch.bool)}
    for prompt in PROMPTS:
        torch.manual_seed(0)
        config = MultimodalMoEConfig(
            backbone="sequences",
            backbone_config={"width": 16, "num_heads": 2, "hidden": 24, "sequences": sequences},
            modalities=list(sequences),
            prompt=prompt,
            num_labels=1,
            problem_type="regression",
        )
        model = MultimodalMoEModel(config)
        logits = model(present=present, inputs=inputs).logits
        assert logits.shape == (7, 1)
        assert logits.isfinite().all()
