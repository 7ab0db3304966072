"""The small CLIP's image tower under a Q-Former: its own tokens, frozen, rebuilt from settings."""

import pytest
import torch

from mm_moe.backbones.blip2 import Blip2Backbone
from mm_moe.backbones.clip_small import SmallClipBackbone
from mm_moe.errors import ConfigError
from mm_moe.models import MultimodalMoEConfig, MultimodalMoEModel, build_model
from tests.blip2_rows import FIELDS

SETTINGS = {name: value for name, value in FIELDS.items() if name != "vision_config"}


@pytest.mark.parametrize("stage_one", [False, True])
def test_builtin_is_the_small_clips_tower_frozen(stage_one, tmp_path):
    config = MultimodalMoEConfig(
        backbone="blip2", backbone_config={**SETTINGS, "stage_one": stage_one}, num_labels=0
    )
    model = build_model(config, pretrained="builtin").eval()
    pixels = {"pixel_values": torch.randn(2, 3, 64, 64, generator=torch.manual_seed(0))}
    tower = model.backbone.towers["image"]
    memory = tower.memory(pixels)
    assert memory.shape == (2, 17, 128)
    assert not memory.requires_grad
    clip = SmallClipBackbone.load("builtin", settings={}, modalities=("image",)).eval()
    with torch.no_grad():
        feature, _ = clip.encode("image", pixels)
        projected = clip.towers["image"].projection(memory[:, 0])
    assert torch.allclose(feature, projected, atol=1e-5)  # the class token is the library's own
    model.save_pretrained(tmp_path)
    again = MultimodalMoEModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        first = model.backbone.encode("image", pixels)[0]
        assert torch.equal(again.backbone.encode("image", pixels)[0], first)


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ({"vision_from": "large_clip"}, "vision_from 'large_clip' is unknown; known: small_clip"),
        ({"vision_from": "small_clip", "blocks": "vision"}, "BLIP-2's own vision transformer"),
    ],
)
def test_what_cannot_be_is_refused(own, words):
    with pytest.raises(ConfigError, match=words):
        Blip2Backbone({**SETTINGS, **own})
