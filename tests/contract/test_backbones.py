"""Every registered backbone: towers that run, can be made sparse, and say what they take in."""

import pytest
import torch

from mm_moe.errors import ConfigError
from mm_moe.moe.layer import moe_layers
from mm_moe.moe.settings import MoESettings
from mm_moe.moe.upcycle import upcycle
from mm_moe.registry import BACKBONES

torch.set_num_threads(1)
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TINY = {  # small settings, so that the test is quick
    "small_clip": {"width": 16, "num_blocks": 2, "hidden": 24, "projection": 8, "num_heads": 2},
    "clip": {
        "text_config": TOWER | {"vocab_size": 40, "max_position_embeddings": 9, "eos_token_id": 1},
        "vision_config": TOWER | {"image_size": 16, "patch_size": 8},
        "projection_dim": 8,
    },
    "siglip": {
        "text_config": TOWER | {"vocab_size": 40, "max_position_embeddings": 9},
        "vision_config": TOWER | {"image_size": 16, "patch_size": 8},
    },
    "blip2": {
        "vision_config": TOWER | {"image_size": 16, "patch_size": 8},
        "qformer_config": TOWER | {"vocab_size": 40, "max_position_embeddings": 9},
        "num_query_tokens": 3,
        "image_text_hidden_size": 8,
    },
    "sequences": {
        "width": 16,
        "num_blocks": 2,
        "num_heads": 2,
        "hidden": 24,
        "projection": 8,
        "sequences": {
            "text": {"width": 6, "length": 5},
            "audio": {"width": 4, "length": 7},
            "vision": {"width": 3, "length": 4},
        },
    },
    "text_encoder": TOWER | {"vocab_size": 40, "max_position_embeddings": 9},
    "timm": {
        "model": "vit_tiny_patch16_224",
        "image_size": 16,
        "model_args": {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8},
    },
    "open_clip": {
        "model_cfg": {
            "embed_dim": 8,
            "vision_cfg": {
                "image_size": 16,
                "patch_size": 8,
                "width": 16,
                "layers": 2,
                "head_width": 8,
            },
            "text_cfg": {
                "context_length": 9,
                "vocab_size": 40,
                "width": 16,
                "heads": 2,
                "layers": 2,
            },
        }
    },
}
TINY["small"] = {
    "num_blocks": 2,
    "towers": {"audio": {"layers": 1}},
    "sequences": {"static": {"width": 5, "length": 1}, "series": {"width": 3, "length": 4}},
    "arrays": {
        "image": {"shape": [8, 8], "scale": 255.0},
        "audio": {"shape": [2, 9, 8], "scale": 1.0},
    },
}
TINY["clinical"] = {
    "num_tokens": 3,
    "token_width": 8,
    "num_blocks": 2,
    "num_heads": 2,
    "towers": {"genomic": {"kind": "dosage"}, "volume": {"channels": 2}},
    "sequences": {
        "table": {"width": 5, "length": 1},
        "genomic": {"width": 7, "length": 1},
        "series": {"width": 3, "length": 5},
        "events": {"width": 3, "length": 6, "events": {"variables": ["a", "b"], "hours": 48.0}},
    },
    "arrays": {"volume": {"shape": [6, 7, 5], "scale": 2.0, "mean": 1.0}},
}
TINY["features"] = {
    "sequences": {"image": {"width": 6, "length": 1}, "text": {"width": 6, "length": 1}}
}
TINY["dual"] = {
    "image": {"backbone": "timm", "config": TINY["timm"]},
    "text": {"backbone": "text_encoder", "config": TINY["text_encoder"]},
    "width": 8,
}


@pytest.fixture(params=sorted(BACKBONES))
def backbone(request):
    torch.manual_seed(0)
    backbone_class = BACKBONES.resolve(request.param)
    assert request.param in TINY, f"add small settings of {request.param!r} to TINY"
    return backbone_class(TINY[request.param], modalities=backbone_class.supported).eval()


def test_towers_say_their_shapes(backbone):
    for index, (name, tower) in enumerate(backbone.towers.items()):
        x_NLD, mask_NL = tower.embed(tower.blank())
        assert x_NLD.shape[2] == tower.width
        assert mask_NL is None or mask_NL.shape == x_NLD.shape[:2]
        assert tower.modality_index == index == backbone.modalities.index(name)
        width = backbone.feature_width(name)
        assert backbone.encode(name, tower.blank())[0].shape == (1, width)
        assert width <= backbone.out_width


def test_settings_rebuild_the_backbone(backbone):
    again = type(backbone)(backbone.settings, modalities=backbone.modalities)
    assert again.settings == backbone.settings
    again.load_state_dict(backbone.state_dict())


def test_an_edit_that_does_nothing_changes_nothing(backbone):
    class Nothing:
        prefix = 0

        def before(self, layer, x_NLD, mask_NL):
            return x_NLD, mask_NL

        def keys_values(self, layer):
            return None

        def after(self, layer, x_NLD, mask_NL):
            return x_NLD

    for name, tower in backbone.towers.items():
        plain, _ = backbone.encode(name, tower.blank())
        assert torch.equal(backbone.encode(name, tower.blank(), Nothing())[0], plain)


def test_edits_reach_every_block_and_the_prefix_is_not_read(backbone):
    class Prefix:
        def __init__(self):
            self.prefix, self.layers = 0, []

        def before(self, layer, x_NLD, mask_NL):
            if layer == 0:
                self.prefix = 3
                x_NLD = torch.cat([torch.zeros_like(x_NLD[:, :1]).expand(-1, 3, -1), x_NLD], 1)
            return x_NLD, None

        def keys_values(self, layer):
            self.layers.append(layer)
            return None

        def after(self, layer, x_NLD, mask_NL):
            x_NLD = x_NLD.clone()
            x_NLD[:, :3] = float("nan") if layer == tower.num_blocks - 1 else 0.0
            return x_NLD

    for name, tower in backbone.towers.items():
        edit = Prefix()
        features, _ = backbone.encode(name, tower.blank(), edit)
        assert edit.layers == list(range(tower.num_blocks))
        assert features.isfinite().all()


def test_upcycled_everywhere_equals_dense(backbone):
    dense = {n: backbone.encode(n, t.blank())[0] for n, t in backbone.towers.items()}
    for tower in backbone.towers.values():
        assert len(tower.feed_forwards()) == tower.num_blocks
        for parent, attribute in tower.feed_forwards():
            sparse = upcycle(getattr(parent, attribute), settings=MoESettings(num_experts=3))
            setattr(parent, attribute, sparse)
    assert len(moe_layers(backbone)) == sum(t.num_blocks for t in backbone.towers.values())
    for name, tower in backbone.towers.items():
        features, records = backbone.encode(name, tower.blank())
        assert torch.allclose(features, dense[name], atol=1e-5)
        assert list(records) == [f"{name}.{i}" for i in range(tower.num_blocks)]
        blank, records = backbone.encode(name, None)
        assert blank.isfinite().all()
        assert all(not record.tokens_E.any() for record in records.values())


def test_an_unknown_modality_is_named(backbone):
    with pytest.raises(ConfigError, match="smell"):
        type(backbone)(backbone.settings, modalities=("smell",))


def test_processor_needs_follow_the_settings(backbone):
    needs = type(backbone).processor_needs(backbone.settings)
    if backbone.takes_arrays:
        assert {*needs.sequences, *needs.arrays} == set(backbone.towers)
        return
    if backbone.takes_sequences:
        assert set(needs.sequences) == set(backbone.towers)
        for name, tower in backbone.towers.items():
            assert needs.sequences[name].width == tower.raw_width
        return
    if "image" in backbone.modalities:
        assert needs.image_size == backbone.towers["image"].image_size
    if "text" in backbone.modalities:
        assert needs.vocab_size == backbone.towers["text"].token_embedding.num_embeddings
