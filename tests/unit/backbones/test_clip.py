"""The CLIP towers give the library's own numbers, and fail clearly."""

import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel

from mm_moe.backbones.attention import attend
from mm_moe.backbones.clip import ClipBackbone
from mm_moe.backbones.clip_small import SmallClipBackbone
from mm_moe.backbones.library import json_fields
from mm_moe.backbones.weights import save_weights
from mm_moe.errors import CheckpointError, ConfigError

torch.set_num_threads(1)
SHARED = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}


def tiny_config(eos: int = 1) -> CLIPConfig:
    return CLIPConfig(
        text_config=SHARED
        | {"vocab_size": 50, "max_position_embeddings": 10, "eos_token_id": eos, "bos_token_id": 0},
        vision_config=SHARED | {"image_size": 16, "patch_size": 8, "hidden_size": 40},
        projection_dim=24,
    )


def payloads(eos: int = 1) -> dict[str, dict[str, torch.Tensor]]:
    ids_NL = torch.tensor(
        [[0, 7, 9, 11, eos, 3, 3], [0, 8, eos, 3, 3, 3, 3], [0, 4, 5, 6, 7, 8, eos]]
    )
    mask_NL = (torch.arange(7) < torch.tensor([[5], [3], [7]])).long()
    generator = torch.Generator().manual_seed(0)
    return {
        "image": {"pixel_values": torch.randn(3, 3, 16, 16, generator=generator)},
        "text": {"input_ids": ids_NL, "attention_mask": mask_NL},
    }


@pytest.mark.parametrize("eos", [1, 2, 49])
def test_features_equal_the_librarys_own_with_padding(eos, tmp_path):
    clip = CLIPModel(tiny_config(eos)).eval()
    clip.save_pretrained(tmp_path)
    backbone = ClipBackbone.load(str(tmp_path), settings={}, modalities=("image", "text")).eval()
    rows = payloads(49 if eos == 2 else eos)  # a stored 2 means "the largest id"
    with torch.no_grad():
        image = clip.get_image_features(**rows["image"]).pooler_output
        text = clip.get_text_features(**rows["text"]).pooler_output
        assert torch.allclose(backbone.encode("image", rows["image"])[0], image, atol=1e-5)
        assert torch.allclose(backbone.encode("text", rows["text"])[0], text, atol=1e-5)
    assert image.abs().mean() > 1e-3  # not equal by being zero


def test_settings_rebuild_the_same_shapes(tmp_path):
    CLIPModel(tiny_config()).save_pretrained(tmp_path)
    loaded = ClipBackbone.load(str(tmp_path), settings={}, modalities=("image", "text"))
    again = ClipBackbone(loaded.settings, modalities=("image", "text"))
    shapes = {k: v.shape for k, v in loaded.state_dict().items()}
    assert shapes == {k: v.shape for k, v in again.state_dict().items()}
    again.load_state_dict(loaded.state_dict())
    rows = payloads()
    assert torch.equal(
        loaded.encode("text", rows["text"])[0], again.encode("text", rows["text"])[0]
    )


def test_extra_keys_of_length_zero_change_nothing():
    for tower in ClipBackbone(json_fields(tiny_config())).towers.values():
        x_NLD = torch.randn(2, 5, tower.width)
        none = (torch.zeros(2, 0, tower.width), torch.zeros(2, 0, tower.width))
        plain, _ = tower.block(0, x_NLD)
        assert torch.allclose(tower.block(0, x_NLD, None, none)[0], plain, atol=1e-6)


def test_extra_keys_by_hand():
    # one head, width 1: query 0 weighs all keys alike, so that the output is a mean of values
    query_NLD = key_NLD = torch.zeros(1, 2, 1)
    value_NLD = torch.tensor([[[3.0], [6.0]]])
    extra = (torch.zeros(1, 1, 1), torch.tensor([[[9.0]]]))
    out = attend(query_NLD, key_NLD, value_NLD, extra=extra, num_heads=1, causal=True)
    assert out.flatten().tolist() == [6.0, 6.0]  # (9 + 3) / 2 and (9 + 3 + 6) / 3
    out = attend(query_NLD, key_NLD, value_NLD, extra=extra, num_heads=1, causal=False)
    assert out.flatten().tolist() == [6.0, 6.0]
    value_NLD[0, 1] = 0.0
    out = attend(query_NLD, key_NLD, value_NLD, extra=extra, num_heads=1, causal=True)
    assert out.flatten().tolist() == [6.0, 4.0]


def test_blank_row_runs_in_every_tower():
    backbone = SmallClipBackbone({"width": 16, "num_blocks": 1, "hidden": 16, "projection": 8})
    for modality in ("image", "text"):
        features, records = backbone.encode(modality, None)
        assert features.shape == (1, 8)
        assert features.isfinite().all()
        assert records == {}


def test_one_tower_alone():
    backbone = SmallClipBackbone({"width": 16, "num_blocks": 1}, modalities=("text",))
    assert list(backbone.towers) == ["text"]
    assert not [name for name, _ in backbone.named_parameters() if "patch" in name]


def test_weights_round_trip_in_half_precision(tmp_path):
    small = {"width": 16, "num_blocks": 1, "hidden": 16, "projection": 8}
    backbone = SmallClipBackbone(small)
    save_weights(backbone, tmp_path / "w.safetensors")
    again = SmallClipBackbone.load(
        str(tmp_path / "w.safetensors"), settings=small, modalities=("text",)
    )
    theirs = dict(backbone.named_parameters())
    for name, parameter in again.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, theirs[name].half().float())


def test_weights_of_another_shape_are_refused(tmp_path):
    save_weights(SmallClipBackbone({"width": 16, "num_blocks": 1}), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=r"has shape \(16,\), the model \(32,\)"):
        SmallClipBackbone.load(
            str(tmp_path / "w.safetensors"),
            settings={"width": 32, "num_blocks": 1},
            modalities=("image", "text"),
        )
    (tmp_path / "broken.safetensors").write_bytes(b"not weights")
    with pytest.raises(CheckpointError, match="not a readable"):
        SmallClipBackbone.load(
            str(tmp_path / "broken.safetensors"), settings={}, modalities=("text",)
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patchsize": 8}, "did you mean patch_size"),
        ({"image_size": 60}, r"image_size \(60\).*patch_size \(16\); try image_size=64"),
        ({"width": 126}, r"width \(126\).*num_heads \(4\)"),
        ({"num_blocks": 0}, "num_blocks"),
    ],
)
def test_wrong_settings_name_the_numbers(settings, message):
    with pytest.raises(ConfigError, match=message):
        SmallClipBackbone(settings)


def test_wrong_input_names_the_numbers():
    backbone = SmallClipBackbone({"width": 16, "num_blocks": 1})
    with pytest.raises(ConfigError, match="64 x 64 pixels, the batch has 32 x 32"):
        backbone.encode("image", {"pixel_values": torch.zeros(1, 3, 32, 32)})
    ids_NL = torch.zeros(1, 30, dtype=torch.long)
    with pytest.raises(ConfigError, match="30 tokens does not fit the text tower's 24"):
        backbone.encode("text", {"input_ids": ids_NL, "attention_mask": torch.ones_like(ids_NL)})
    with pytest.raises(ConfigError, match="no modality 'imag'; did you mean image"):
        SmallClipBackbone({}, modalities=("imag", "text"))


def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="no CLIP checkpoint could be read"):
        ClipBackbone.load(str(tmp_path / "nothing"), settings={}, modalities=("image", "text"))


def test_feed_forwards_point_to_every_block():
    backbone = SmallClipBackbone({"width": 16, "num_blocks": 3})
    for tower in backbone.towers.values():
        places = tower.feed_forwards()
        assert len(places) == tower.num_blocks == 3
        assert all(isinstance(getattr(parent, name), nn.Module) for parent, name in places)
