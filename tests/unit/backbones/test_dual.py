"""Two towers of two libraries in one model: projected, locked, saved and loaded again."""

import pytest
import torch
from transformers import BertConfig, BertModel

from mm_moe.backbones.dual import DualBackbone
from mm_moe.errors import ConfigError
from mm_moe.models import MultimodalMoEConfig, MultimodalMoEModel, build_model
from mm_moe.registry import BACKBONES
from tests.contract.test_backbones import TINY

torch.set_num_threads(1)
IDS_NL = torch.tensor([[5, 7, 9, 11], [6, 8, 0, 0]])
INPUTS = {
    "image": {"pixel_values": torch.randn(2, 3, 16, 16)},
    "text": {"input_ids": IDS_NL, "attention_mask": (IDS_NL > 0).long()},
}
PRESENT = torch.ones(2, 2, dtype=torch.bool)


def test_features_are_the_parts_features_projected():
    backbone = DualBackbone(TINY["dual"]).eval()
    for name in ("image", "text"):
        part = TINY["dual"][name]
        alone = BACKBONES.resolve(part["backbone"])(part["config"], modalities=(name,)).eval()
        alone.towers[name].load_state_dict(backbone.towers[name].state_dict())
        projection = backbone.projections[name]
        expected = projection(alone.encode(name, INPUTS[name])[0])
        assert torch.allclose(backbone.encode(name, INPUTS[name])[0], expected, atol=1e-6)


def test_pretrained_parts_and_a_saved_model_that_stands_alone(tmp_path):
    library = BertModel(BertConfig(**TINY["text_encoder"]))
    library.save_pretrained(tmp_path / "bert")
    settings = TINY["dual"] | {
        "text": {"backbone": "text_encoder", "pretrained": str(tmp_path / "bert")}
    }
    config = MultimodalMoEConfig(
        backbone="dual", backbone_config=settings, moe={"num_experts": 2}, num_labels=3
    )
    model = build_model(config).eval()
    word = model.backbone.towers["text"].token_embedding.weight
    assert torch.equal(word, library.embeddings.word_embeddings.weight)
    assert "pretrained" not in model.config.backbone_config["text"]
    model.save_pretrained(tmp_path / "saved")
    library.embeddings.word_embeddings.weight.data.zero_()
    library.save_pretrained(tmp_path / "bert")  # what happens there later does not matter
    again = MultimodalMoEModel.from_pretrained(tmp_path / "saved").eval()
    with torch.no_grad():
        assert torch.equal(again(PRESENT, INPUTS).logits, model(PRESENT, INPUTS).logits)


def test_a_locked_tower_has_a_projection_that_trains():
    config = MultimodalMoEConfig(backbone="dual", backbone_config=TINY["dual"], num_labels=3)
    model = MultimodalMoEModel(config)
    model.freeze(("image", "text"))
    counts = dict(model.trainable_report())
    assert counts["image tower"] == counts["text tower"] == 0
    assert counts["image projections"] == counts["text projections"] == 16 * 8 + 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "dual needs backbone_config.image with a backbone"),
        ({**TINY["dual"], "width": 0}, r"width \(0\)"),
        ({**TINY["dual"], "image": {"backbone": "text_encoder"}}, "no modality 'image'"),
        ({**TINY["dual"], "text": {"backbone": "clap"}}, "unknown backbone 'clap'"),
        ({**TINY["dual"], "text": {"backbone": "clip", "weights": 1}}, "unknown dual.text option"),
        ({**TINY["dual"], "size": 3}, "unknown dual option"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        DualBackbone(settings)
