"""LIMoE's one tower: shared blocks and experts, and losses whose settings differ by modality."""

import math

import pytest
import torch

from launch.moe_flags import _check_types
from mm_moe.errors import ConfigError
from mm_moe.models.configuration import MultimodalMoEConfig
from mm_moe.models.modeling import MultimodalMoEModel
from mm_moe.moe.settings import MoESettings
from tests.contract.test_backbones import TINY

ENTROPIES = {
    "num_experts": 3,
    "load_balance_coef": 0.5,
    "global_entropy_coef": 0.04,
    "by_modality": {"text": {"local_entropy_coef": 0.25, "load_balance_coef": 0.0}},
}


def model(one_tower=True, moe=ENTROPIES, **fields):
    torch.manual_seed(0)
    config = MultimodalMoEConfig(
        backbone_config={**TINY["small_clip"], "one_tower": one_tower},
        moe=moe,
        moe_layers=[0],
        num_labels=0,
        **fields,
    )
    return MultimodalMoEModel(config)


def inputs(images=3, texts=3):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 100, (texts, 5), generator=generator)
    ids[:, -1] = 1
    found = {
        "image": {"pixel_values": torch.randn(images, 3, 64, 64, generator=generator)},
        "text": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
    }
    return {name: payload for name, payload in found.items() if len(next(iter(payload.values())))}


def present(*rows):
    return torch.tensor(rows, dtype=torch.bool)


def test_blocks_and_experts_are_shared_and_counted_once():
    one, two = model(), model(one_tower=False)
    assert list(one.sparse_layers()) == ["image.0", "text.0"]
    assert one.sparse_layers()["image.0"] is one.sparse_layers()["text.0"]
    blocks = sum(p.numel() for p in one.backbone.towers["image"].layers.parameters())
    count = {kind: sum(p.numel() for p in m.parameters()) for kind, m in (("1", one), ("2", two))}
    assert count["2"] - count["1"] == blocks
    assert not any(name.startswith("backbone.towers.text.layers") for name in one.state_dict())


def test_both_modalities_send_gradients_into_the_same_experts():
    found = model()
    layer = found.sparse_layers()["image.0"]

    def gradient(*features):
        found.zero_grad()
        output = found(present((1, 1), (1, 1), (1, 1)), inputs())
        sum(output.features[name].square().sum() for name in features).backward()
        return [p.grad.clone() for p in layer.experts.parameters() if p.grad is not None]

    both, image, text = gradient("image", "text"), gradient("image"), gradient("text")
    for total, first, second in zip(both, image, text, strict=True):
        assert torch.allclose(total, first + second, atol=1e-5)
    assert all(any(grad.abs().sum() > 0 for grad in grads) for grads in (image, text))


def test_a_rank_without_a_modality_runs_and_gives_every_parameter_a_gradient():
    found = model()
    output = found(present((1, 0), (1, 0)), inputs(2, 0))
    assert not output.features["text"].any()
    loss = sum(part.sum() for part in output.features.values()) + sum(output.losses.values())
    loss.backward()
    lacking = [name for name, p in found.named_parameters() if p.grad is None]
    assert lacking == ["logit_scale"]
    assert output.routing["text.0"].metrics["tokens"] == 0


def test_a_saved_model_loads_again(tmp_path):
    found = model().eval()
    found.save_pretrained(tmp_path)
    again = MultimodalMoEModel.from_pretrained(tmp_path).eval()
    batch = (present((1, 1), (1, 1), (1, 1)), inputs())
    with torch.no_grad():
        for name, feature in found(*batch).features.items():
            assert torch.equal(again(*batch).features[name], feature)
    assert again.config.moe["by_modality"] == ENTROPIES["by_modality"]


@pytest.mark.parametrize("one_tower", [True, False])
def test_losses_have_the_settings_of_their_modality(one_tower):
    """Texts alone pay for undecided tokens and not for balance; the coefficient is the factor."""
    routing = model(one_tower)(present((1, 1), (1, 1), (1, 1)), inputs()).routing
    image, text = routing["image.0"], routing["text.0"]
    assert "local_entropy" not in image.losses
    entropy = text.metrics["router_entropy"]
    assert text.losses["local_entropy"].item() == pytest.approx(0.25 * entropy.item(), rel=1e-5)
    assert text.losses["load_balance"] == 0
    assert image.losses["load_balance"] >= 0.5 - 1e-6
    text.losses["local_entropy"].backward()


def test_a_threshold_of_its_own():
    settings = MoESettings(
        num_experts=8,
        global_entropy_coef=1.0,
        by_modality={"text": {"global_entropy_threshold": math.log(3)}},
        modalities=("image", "text"),
    )
    assert settings.of_modality(0) is not settings
    assert settings.of_modality(0).global_entropy_threshold is None
    assert settings.of_modality(1).global_entropy_threshold == math.log(3)
    assert settings.of_modality(None) is settings


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"by_modality": {"text": {"local_entropy": 1}}}, "did you mean local_entropy_coef"),
        ({"by_modality": {"text": {"top_k": 1}}}, "top_k"),
        ({"by_modality": {"text": {"router_z_coef": -1}}}, "must be finite and not negative"),
        ({"by_modality": {"text": {"router_z_coef": "1"}}}, "must be a number"),
        ({"by_modality": {"text": 1}}, "must be an object"),
        ({"by_modality": {"txt": {}}}, "did you mean text"),
    ],
)
def test_settings_that_cannot_be_are_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        model(moe=values)


def test_the_flag_takes_an_object_only():
    _check_types({"by_modality": {"text": {}}})
    with pytest.raises(ConfigError, match="must be an object"):
        _check_types({"by_modality": 3})


def test_only_true_and_false_choose_the_towers():
    with pytest.raises(ConfigError, match="true or false"):
        model(one_tower=1)
