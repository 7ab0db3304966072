"""A whole run on clinical data: encoders, sparse fusion, survival, scores and the saved model."""

from __future__ import annotations

import pytest

from tests.distributed.harness import run_distributed
from tests.distributed.runs import column, train_here, write_recipe

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

RECIPE = """\
# A run of seconds.
dataset: tests.clinical_data:ClinicalData
missing_type: any
missing_ratio: 0.3
backbone: clinical
pretrained: none
backbone_config: '{"num_tokens": 2, "token_width": 16, "num_heads": 2, "num_blocks": 1}'
fusion: transformer
fusion_config: '{"num_heads": 2, "sparse": "all", "num_experts": 4, "top_k": 2, "dropout": 0.0}'
objective: cox
num_experts: [2]
moe_mode: dense
prompt: none
max_steps: 30
global_batch_size: 16
learning_rate: 3.0e-3
logging_steps: 1
save_strategy: "no"
"""


def test_runs_of_one_and_two_processes_follow_one_curve_and_order_the_patients(tmp_path):
    from transformers import AutoModel

    import mm_moe.models  # noqa: F401  (registers the model type)

    pytest.importorskip("sksurv", reason="needs scikit-survival")
    words = ["--config", write_recipe(tmp_path, RECIPE)]
    results = []
    for world_size in (1, 2):
        folder = tmp_path / str(world_size)
        argv = [*words, "--output_dir", str(folder), "--ep_size", str(world_size)]
        results.append(run_distributed(train_here, world_size, [argv], timeout_s=400)[0][0])
    alone, pair = (column(result, "loss") for result in results)
    assert len(alone) == len(pair) == 30
    assert max(abs(a - b) for a, b in zip(alone, pair, strict=True)) < 1e-4
    ours, theirs = (result["scores"]["models"]["no prompts"] for result in results)
    assert ours["complete"]["c_index"] > 0.65
    assert theirs["complete"] == pytest.approx(ours["complete"], abs=0.02)
    model = AutoModel.from_pretrained(tmp_path / "2" / "final")
    assert list(model.sparse_layers()) == ["labs.0", "vitals.0", "events.0", "fusion.0"]
