"""Two images, one tower: equal weights, one set of parameters, gradients that add up."""

import copy

import pytest
import torch

from mm_moe.backbones.clip_small import SmallClipBackbone
from mm_moe.errors import ConfigError
from mm_moe.models.configuration import MultimodalMoEConfig
from mm_moe.models.modeling import MultimodalMoEModel
from tests.contract.test_backbones import TINY

PAIR = ("image_0", "image_1", "text")


def model(modalities=PAIR, **fields):
    torch.manual_seed(0)
    config = MultimodalMoEConfig(
        backbone="small_clip",
        backbone_config=TINY["small_clip"],
        modalities=modalities,
        label_names=["no", "yes"],
        **fields,
    )
    return MultimodalMoEModel(config)


def pixels(seed):
    return {
        "pixel_values": torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
    }


def test_both_images_have_the_features_of_the_one_tower():
    pair, one = model(), model(("image", "text"))
    assert sum(p.numel() for p in pair.backbone.parameters()) == sum(
        p.numel() for p in one.backbone.parameters()
    )
    state = {
        k.replace("towers.image.", "towers.image_0."): v
        for k, v in one.backbone.state_dict().items()
    }
    pair.backbone.load_state_dict(state)
    for name in ("image_0", "image_1"):
        assert torch.equal(
            pair.backbone.encode(name, pixels(1))[0], one.backbone.encode("image", pixels(1))[0]
        )


def test_gradients_of_both_images_add_up():
    backbone = model(moe={"num_experts": 2}, moe_layers=[1]).backbone

    def gradient(*uses):
        backbone.zero_grad()
        sum(backbone.encode(name, pixels(seed))[0].square().sum() for name, seed in uses).backward()
        return [p.grad.clone() for p in backbone.towers["image_0"].parameters()]

    both = gradient(("image_0", 1), ("image_1", 2))
    single = zip(gradient(("image_0", 1)), gradient(("image_0", 2)), strict=True)
    assert all(torch.allclose(x, a + b, atol=1e-5) for x, (a, b) in zip(both, single, strict=True))


def test_a_shared_block_is_sparse_for_both_and_records_tell_them_apart():
    sparse = model(moe={"num_experts": 2}, moe_layers={"image_0": [1]})
    present = torch.ones(3, 3, dtype=torch.bool)
    present[:, 2] = False
    output = sparse(present, {"image_0": pixels(1), "image_1": pixels(2)})
    assert set(output.routing) == {"image_0.1", "image_1.1"}
    assert sparse.backbone.towers["image_1"].modality_index == 1
    assert (
        sparse.backbone.sparse_layers()["image_1.1"] is sparse.backbone.sparse_layers()["image_0.1"]
    )


def test_a_copy_and_a_saved_model_keep_one_tower(tmp_path):
    pair = model()
    twin = copy.deepcopy(pair)
    assert twin.backbone.towers["image_1"].tower is twin.backbone.towers["image_0"]
    pair.save_pretrained(tmp_path)
    loaded = MultimodalMoEModel.from_pretrained(tmp_path)
    for name in ("image_0", "image_1"):
        assert torch.equal(
            loaded.backbone.encode(name, pixels(3))[0], pair.backbone.encode(name, pixels(3))[0]
        )
    loaded.freeze(["image_0", "image_1"])
    assert not any(p.requires_grad for p in loaded.backbone.towers["image_0"].parameters())


def test_shipped_weights_fill_the_shared_tower():
    one = SmallClipBackbone.load("builtin", settings={}, modalities=("image",))
    pair = SmallClipBackbone.load("builtin", settings={}, modalities=("image_1", "image_0"))
    assert pair.first_names == {"image": "image_1"}
    assert torch.equal(pair.encode("image_0", pixels(1))[0], one.encode("image", pixels(1))[0])


def test_lora_is_put_on_once():
    adapted = model(lora={"r": 2}).backbone
    names = [n for n, _ in adapted.named_parameters() if "lora_A" in n]
    assert len(names) == len(set(names)) > 0
    assert not any(n.startswith("towers.image_1.") for n in names)


def test_only_numbers_make_a_further_image():
    with pytest.raises(ConfigError, match="image_left"):
        model(("image_left", "text"))


def test_a_context_is_read_by_the_text_tower():
    both = model(("text", "context"))
    assert list(both.backbone.state_dict()) == list(model(("text",)).backbone.state_dict())
    words = {"input_ids": torch.tensor([[1, 5, 2]]), "attention_mask": torch.ones(1, 3).long()}
    feature, *others = (both.backbone.encode(name, words)[0] for name in ("text", "context"))
    assert torch.equal(feature, others[0])
