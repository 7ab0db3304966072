"""LoRA on every registered backbone: starts as the plain model, trains alone, merges, reloads."""

import pytest
import torch

from mm_moe.models import MultimodalMoEConfig, MultimodalMoEModel
from mm_moe.registry import BACKBONES
from tests.contract.test_backbones import TINY

torch.set_num_threads(1)
UNUSED_BY_ONE_TOKEN = ("query", "key", "q_proj", "k_proj", "cross")
WITHOUT_ATTENTION = {"small", "features"}


def small_model(name, **fields):
    torch.manual_seed(0)
    config = MultimodalMoEConfig(
        backbone=name,
        backbone_config=TINY[name],
        modalities=BACKBONES.resolve(name).supported,
        moe={"num_experts": 2},
        num_labels=3,
        **fields,
    )
    return MultimodalMoEModel(config).eval()


def batch_of(model):
    inputs = {name: tower.blank() for name, tower in model.backbone.towers.items()}
    return torch.ones(1, len(inputs), dtype=torch.bool), inputs


@pytest.mark.parametrize("name", sorted(set(BACKBONES) - WITHOUT_ATTENTION))
def test_adapters_on_every_backbone(name, tmp_path):
    plain = small_model(name)
    model = small_model(name, lora={"r": 2, "alpha": 4.0})
    adapters = [p for n, p in model.named_parameters() if ".lora_" in n]
    assert adapters

    model.merge_lora()  # B is zero: the plain model's own names and numbers
    assert model.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(model.state_dict())

    model = MultimodalMoEModel(
        MultimodalMoEConfig.from_dict(plain.config.to_dict() | {"lora": {"r": 2, "alpha": 4.0}}),
        backbone=model.backbone,
    )
    model.head.load_state_dict(plain.head.state_dict())
    batch = batch_of(model.eval())
    with torch.no_grad():
        expected = plain(*batch).logits
        assert torch.allclose(model(*batch).logits, expected, atol=1e-5)

    output = model(*batch)
    (output.logits.square().sum() + sum(output.losses.values())).backward()
    for path, parameter in model.named_parameters():
        if ".lora_B" in path:
            assert parameter.grad is not None, path
            # a single token attends to itself whatever it asks for
            if not any(part in path for part in UNUSED_BY_ONE_TOKEN):
                assert parameter.grad.abs().sum() > 0, path
    counts = dict(model.trainable_report())
    for modality in model.modalities:
        assert counts[f"{modality} tower"] == 0
        assert counts[f"{modality} lora"] > 0
        assert counts[f"{modality} experts"] > 0

    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if ".lora_" in path:
                parameter.normal_(std=0.1)
        moved = model(*batch).logits
        assert not torch.allclose(moved, expected, atol=1e-4)
        model.save_pretrained(tmp_path)
        again = MultimodalMoEModel.from_pretrained(tmp_path).eval()
        assert torch.equal(again(*batch).logits, moved)
        again.merge_lora()
        assert torch.allclose(again(*batch).logits, moved, atol=1e-5)
        again.save_pretrained(tmp_path / "merged")
        merged = MultimodalMoEModel.from_pretrained(tmp_path / "merged").eval()
        assert merged.config.lora is None
        assert torch.equal(merged(*batch).logits, again(*batch).logits)
