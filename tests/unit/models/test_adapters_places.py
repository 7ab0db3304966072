"""Where adapters go, what stays trainable beside them, and what is refused."""

import pytest
import torch

from launch.assemble import locked_towers
from launch.model_config import lora_fields
from mm_moe.arguments import ModelArguments
from mm_moe.errors import ConfigError
from mm_moe.models import MultimodalMoEConfig, MultimodalMoEModel, build_model

torch.set_num_threads(1)
SMALL = {"width": 16, "num_blocks": 3, "hidden": 24, "projection": 8, "num_heads": 2}


def small_model(lora=None, moe=None, **fields) -> MultimodalMoEModel:
    return MultimodalMoEModel(
        MultimodalMoEConfig(
            backbone_config=SMALL,
            lora=lora,
            moe=moe,
            num_labels=3,
            prompt="missing_aware",
            **fields,
        )
    )


def trained(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_counts_by_hand():
    counts = dict(small_model({"r": 2}).trainable_report())
    # 3 blocks x 4 projections x (16 -> 2 and 2 -> 16)
    assert counts["image lora"] == counts["text lora"] == 3 * 4 * 2 * 16 * 2
    assert counts["image tower"] == counts["text tower"] == 0
    assert counts["head"] == 16 * 3 + 3
    assert counts["prompt"] > 0


def test_named_layers_only():
    model = small_model({"r": 1, "target": ["fc1", "0.self_attn.q_proj"]}, moe={"num_experts": 2})
    places = {name.split(".lora_")[0] for name in trained(model) if ".lora_" in name}
    assert places == {
        f"backbone.towers.{tower}.layers.{rest}"
        for tower in ("image", "text")
        for rest in ("0.mlp.fc1", "2.mlp.fc1", "0.self_attn.q_proj")  # block 1 is sparse
    }


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"r": 2, "target": ["q_porj"]}, "--lora_target 'q_porj'.*did you mean q_proj"),
        ({"r": 2, "target": ["layer_norm1"]}, "'layer_norm1' is no dense linear layer"),
        ({"r": 0}, r"lora.r \(0\)"),
        ({"r": 2, "dropout": 1.0}, r"lora.dropout \(1.0\)"),
        ({"r": 2, "alpha": 0.0}, r"lora.alpha \(0.0\)"),
        ({"rank": 2}, "unknown lora option 'rank'"),
    ],
)
def test_what_cannot_be_is_refused(lora, message):
    with pytest.raises(ConfigError, match=message):
        small_model(lora)


def test_the_last_blocks_of_a_locked_tower_train():
    model = small_model(moe={"num_experts": 2})
    model.freeze(("image",), unlock_blocks=1)
    names = {n for n in trained(model) if n.startswith("backbone.towers.image")}
    assert {n.split(".layers.")[1].split(".")[0] for n in names} == {"1", "2"}
    assert all(".mlp." in n for n in names if ".layers.1." in n)  # the experts of block 1
    assert "backbone.towers.image.layers.2.self_attn.q_proj.weight" in names
    assert "backbone.towers.text.layers.0.self_attn.q_proj.weight" in trained(model)
    with pytest.raises(ConfigError, match=r"--unlock_blocks \(4\) must lie in 0 to 3"):
        model.freeze(("image",), unlock_blocks=4)


def test_flags():
    assert lora_fields(ModelArguments()) is None
    assert lora_fields(ModelArguments(lora_r=4, lora_target=["fc1"])) == {
        "r": 4,
        "alpha": 16.0,
        "dropout": 0.0,
        "target": ["fc1"],
    }
    both = ("image", "text")
    assert locked_towers(ModelArguments(), both) == ()
    assert locked_towers(ModelArguments(lock_text=True, unlock_blocks=1), both) == ("text",)
    assert locked_towers(ModelArguments(lora_r=4, unlock_blocks=1), both) == both
    with pytest.raises(ConfigError, match=r"--unlock_blocks 2 .* none is locked"):
        locked_towers(ModelArguments(unlock_blocks=2), both)


@pytest.mark.parametrize("moe", [None, {"num_experts": 2}])
def test_a_run_starts_from_a_model_with_adapters_as_it_computes(moe, tmp_path):
    source = small_model({"r": 2}, moe=moe).eval()
    with torch.no_grad():
        for name, parameter in source.named_parameters():
            if ".lora_" in name:
                parameter.normal_()
    source.save_pretrained(tmp_path)
    config = MultimodalMoEConfig(moe=moe, lora={"r": 3}, num_labels=3)
    model = build_model(config, pretrained=str(tmp_path)).eval()
    pixels = {"pixel_values": torch.randn(2, 3, 64, 64)}
    with torch.no_grad():
        ours, theirs = (m.backbone.encode("image", pixels)[0] for m in (model, source))
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert model.config.lora["r"] == 3
    assert sum(n.endswith("lora_A.default.weight") for n in trained(model)) == 24
