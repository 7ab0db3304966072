"""BLIP-2 with experts in the Q-Former over two processes: trains, exports, reloads equal."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import load_file

from mm_moe.data.decode import decode_image
from mm_moe.data.sets.emoji import EmojiData
from mm_moe.models import MultimodalMoEModel, processors_for
from mm_moe.moe.layer import moe_layers
from tests.distributed.harness import run_distributed
from tests.distributed.runs import column, train_here, write_recipe

pytestmark = pytest.mark.distributed
RECIPE = """\
# One epoch of a BLIP-2 of toy size.
dataset: emoji
missing_type: both
missing_ratio: 0.5
backbone: blip2
pretrained: none
tokenizer: builtin
backbone_config:
  vision_config:
    {hidden_size: 16, intermediate_size: 24, num_hidden_layers: 1, num_attention_heads: 2,
     image_size: 64, patch_size: 32}
  qformer_config:
    {hidden_size: 16, intermediate_size: 24, num_hidden_layers: 2, num_attention_heads: 2,
     vocab_size: 4096, max_position_embeddings: 24, hidden_dropout_prob: 0.0,
     attention_probs_dropout_prob: 0.0}
  num_query_tokens: 2
  image_text_hidden_size: 16
moe_layers_idx: [0, 1]
num_experts: 4
prompt: none
num_train_epochs: 1
global_batch_size: 64
learning_rate: 3.0e-3
logging_steps: 1
save_strategy: "no"
final_evaluation: false
"""


def test_one_epoch_with_experts_in_the_qformer_over_two_processes(tmp_path):
    argv = [
        *("--config", write_recipe(tmp_path, RECIPE), "--deepspeed", "ds_configs/zero2.json"),
        *("--output_dir", str(tmp_path / "run"), "--ep_size", "2"),
    ]
    result = run_distributed(train_here, 2, [argv], timeout_s=400)[0][0]
    losses = column(result, "loss")
    assert len(losses) == 24  # 1518 rows in batches of 64
    assert sum(losses[-5:]) < sum(losses[:5])

    final = tmp_path / "run" / "final"
    model = MultimodalMoEModel.from_pretrained(final).eval()
    layers = moe_layers(model)
    assert sorted(layers) == [
        f"backbone.towers.{name}.blocks.{i}.mlp" for name in ("image", "text") for i in (0, 1)
    ]
    assert all(len(layer.experts.w_in) == 4 for layer in layers.values())  # all, not one rank's two
    stored = load_file(final / "model.safetensors")
    state = model.state_dict()
    assert state.keys() == stored.keys()
    assert all(torch.equal(state[name], stored[name]) for name in state)

    source = EmojiData()
    rows = itertools.islice(source.stream("test"), 3)
    samples = [source.to_sample(row) for row in rows]
    processors = processors_for(model.config, source=str(final))
    inputs = {
        "image": processors["image"]([decode_image(s.payload["image"]) for s in samples]),
        "text": processors["text"]([s.payload["text"] for s in samples]),
    }
    present = torch.ones(3, 2, dtype=torch.bool)
    with torch.no_grad():
        first = model(present, inputs).logits
        model.save_pretrained(tmp_path / "again")
        again = MultimodalMoEModel.from_pretrained(tmp_path / "again").eval()
        assert torch.equal(again(present, inputs).logits, first)
    assert not torch.equal(first[0], first[1])
