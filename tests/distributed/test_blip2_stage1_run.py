"""A first-stage BLIP-2 over two processes: learns, is scored, reloads, and goes on with labels."""

from __future__ import annotations

import json

import pytest

from mm_moe.models import MultimodalMoEModel
from mm_moe.moe.layer import moe_layers
from tests.distributed.harness import run_distributed
from tests.distributed.runs import column, train_here, write_recipe

pytestmark = pytest.mark.distributed
SHAPE = "{hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 2"
RECIPE = f"""\
# A first stage of toy size.
dataset: emoji
objective: blip2_stage1
backbone: blip2
pretrained: builtin
backbone_config:
  qformer_config: {SHAPE},
     vocab_size: 4097, pad_token_id: 2, max_position_embeddings: 24, hidden_dropout_prob: 0.0,
     attention_probs_dropout_prob: 0.0, initializer_range: 0.1}}
  num_query_tokens: 3
  image_text_hidden_size: 16
num_experts: 4
upcycle_drop: 0.5
prompt: none
max_steps: 40
global_batch_size: 32
learning_rate: 3.0e-3
warmup_steps: 5
logging_steps: 1
eval_strategy: steps
eval_steps: 40
validation_split: validation
test_split: validation
per_device_eval_batch_size: 64
save_strategy: "no"
"""
TUNED = """\
# What follows it.
dataset: emoji
backbone: blip2
num_experts: 4
prompt: none
max_steps: 2
logging_steps: 1
global_batch_size: 16
save_strategy: "no"
final_evaluation: false
"""


@pytest.mark.slow
def test_it_learns_is_scored_and_is_taken_over(tmp_path):
    (tmp_path / "tuned.yaml").write_text(TUNED)
    shared = ("--deepspeed", "ds_configs/zero2.json", "--ep_size", "2")
    commands = [
        [
            "--config",
            write_recipe(tmp_path, RECIPE),
            "--output_dir",
            str(tmp_path / "run"),
            *shared,
        ],
        [
            *("--config", str(tmp_path / "tuned.yaml"), "--output_dir", str(tmp_path / "tuned")),
            *("--pretrained", str(tmp_path / "run" / "final"), *shared),
        ],
    ]
    found, tuned = run_distributed(train_here, 2, commands, timeout_s=560)[0]
    for part in ("itc", "itm", "itg"):
        losses = column(found, f"loss/{part}")
        assert len(losses) == 40
        assert sum(losses[-10:]) / 10 < sum(losses[:5]) / 5, part
    assert len(column(found, "moe/image.1/load_imbalance")) == 40
    assert len(column(tuned, "loss")) == 2

    scores = json.loads((tmp_path / "run" / "zero_shot-validation.json").read_text())["rows"]
    assert [row["task"] for row in scores] == ["zeroshot_retrieval", "zeroshot_classification"]
    logged = column(found, "eval_emoji_text_retrieval_recall@10")
    assert logged == [scores[0]["metrics"]["text_retrieval_recall@10"]]  # the last step's model

    model = MultimodalMoEModel.from_pretrained(tmp_path / "run" / "final")
    layers = moe_layers(model)
    assert sorted(layers) == [f"backbone.towers.{n}.blocks.1.mlp" for n in ("image", "text")]
    assert all(len(layer.experts.w_in) == 4 for layer in layers.values())
    start = model.backbone.towers["text"].blocks[1].mlp.experts.w_in
    after = MultimodalMoEModel.from_pretrained(tmp_path / "tuned" / "final")
    assert after.config.backbone_config.get("stage_one") is None
    end = after.backbone.towers["text"].blocks[1].mlp.experts.w_in
    assert 0 < (end - start).abs().max() < 1e-3  # two small steps from where the first run ended
