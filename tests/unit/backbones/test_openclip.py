"""The open_clip towers give the library's own numbers, and fail clearly."""

import json

import open_clip
import pytest
import torch

from mm_moe.backbones.openclip import OpenClipBackbone, clip_tokenizer
from mm_moe.errors import CheckpointError, ConfigError
from mm_moe.models import MultimodalMoEConfig, MultimodalMoEModel, build_model, processors_for

torch.set_num_threads(1)
VISION = {"image_size": 16, "patch_size": 8, "width": 24, "layers": 3, "head_width": 8}
TEXT = {"context_length": 9, "vocab_size": 60, "width": 16, "heads": 2, "layers": 3}
FIELDS = {"embed_dim": 8, "vision_cfg": VISION, "text_cfg": TEXT}
VARIANTS = {
    "plain": FIELDS,
    "quick": FIELDS | {"quick_gelu": True},
    "average": FIELDS | {"vision_cfg": VISION | {"pool_type": "avg", "final_ln_after_pool": True}},
    "scaled": FIELDS | {"vision_cfg": VISION | {"ls_init_value": 0.5, "no_ln_pre": True}},
    "custom": FIELDS | {"custom_text": True},
    "eos": FIELDS | {"text_cfg": TEXT | {"pool_type": "eos", "eos_id": 7, "proj_bias": True}},
}
IDS_NL = torch.tensor([[58, 3, 7, 9, 59, 0, 0, 0, 0], [58, 7, 59, 0, 0, 0, 0, 0, 0]])


def library_model(fields):
    torch.manual_seed(0)
    rest = {k: v for k, v in fields.items() if k != "custom_text"}
    kind = open_clip.CustomTextCLIP if fields.get("custom_text") else open_clip.CLIP
    return kind(**rest).eval()


@pytest.mark.parametrize("name", VARIANTS)
def test_features_equal_the_librarys_own(name):
    clip = library_model(VARIANTS[name])
    pixels = torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        image, text = clip.encode_image(pixels), clip.encode_text(IDS_NL)
        backbone = OpenClipBackbone({"model_cfg": VARIANTS[name]}, clip=clip).eval()
        short = IDS_NL[:, :5]  # no need to pad to the context length
        payload = {"input_ids": short, "attention_mask": short != 0}
        assert torch.allclose(
            backbone.encode("image", {"pixel_values": pixels})[0], image, atol=1e-5
        )
        assert torch.allclose(backbone.encode("text", payload)[0], text, atol=1e-5)
    assert text.abs().mean() > 1e-3


def folder_with(clip, folder, fields=FIELDS):
    torch.save(clip.state_dict(), folder / "open_clip_pytorch_model.bin")
    preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    config = {"model_cfg": fields, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(config))


def test_a_local_folder_loads_and_a_saved_model_stands_alone(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    clip = library_model(FIELDS)
    folder_with(clip, source)
    config = MultimodalMoEConfig(backbone="open_clip", moe={"num_experts": 2}, num_labels=3)
    model = build_model(config, pretrained=str(source)).eval()
    assert torch.equal(model.backbone.towers["image"].visual.conv1.weight, clip.visual.conv1.weight)
    assert config.backbone_config["image_mean"] == [0.5, 0.5, 0.5]
    model.save_pretrained(tmp_path / "saved")
    again = MultimodalMoEModel.from_pretrained(tmp_path / "saved")
    inputs = {
        "image": {"pixel_values": torch.randn(2, 3, 16, 16)},
        "text": {"input_ids": IDS_NL, "attention_mask": IDS_NL != 0},
    }
    present = torch.ones(2, 2, dtype=torch.bool)
    with torch.no_grad():
        assert torch.equal(again(present, inputs).logits, model(present, inputs).logits)


def test_a_weight_file_of_a_named_model(tmp_path, monkeypatch):
    open_clip.add_model_config(tmp_path)  # an empty folder: only rescans
    (tmp_path / "tiny-test.json").write_text(json.dumps(FIELDS))
    open_clip.add_model_config(tmp_path / "tiny-test.json")
    clip = library_model(FIELDS)
    torch.save(clip.state_dict(), tmp_path / "w.pt")
    backbone = OpenClipBackbone.load(
        str(tmp_path / "w.pt"), settings={"model": "tiny-test"}, modalities=("text",)
    )
    assert torch.equal(backbone.towers["text"].positional_embedding, clip.positional_embedding)
    with pytest.raises(CheckpointError, match="no weights 'laion9b' for the open_clip model"):
        OpenClipBackbone.load("laion9b", settings={"model": "tiny-test"}, modalities=("text",))


def test_token_ids_are_open_clips():
    texts = ["A photo of a cat's 3 toys!", "grinning face", ""]
    theirs = open_clip.get_tokenizer("ViT-B-32")(texts)
    rows = clip_tokenizer()(texts)["input_ids"]
    for row, expected in zip(rows, theirs.tolist(), strict=True):
        assert row == expected[: len(row)]
        assert not any(expected[len(row) :])


def test_processors_come_from_the_library():
    config = MultimodalMoEConfig(backbone="open_clip", backbone_config={"model": "ViT-B-32"})
    processors = processors_for(config)
    assert processors["image"].height == 224
    assert processors["text"](["cat"])["input_ids"].shape == (1, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "ViT-B-61"}, "unknown open_clip model 'ViT-B-61'; did you mean ViT-B-16"),
        ({}, "model is needed"),
        ({"modle": "x"}, "did you mean model"),
        (
            {"model_cfg": FIELDS | {"text_cfg": TEXT | {"no_causal_mask": True}}},
            "not a plain causal",
        ),
        (
            {"model_cfg": FIELDS | {"vision_cfg": VISION | {"layers": [1, 1, 1, 1]}}},
            "ModifiedResNet",
        ),
        ({"model_cfg": FIELDS | {"vision_cfg": VISION | {"qk_norm": True}}}, "custom ones"),
    ],
)
def test_what_is_not_supported_is_said(settings, message):
    with pytest.raises(ConfigError, match=message):
        OpenClipBackbone(settings)
