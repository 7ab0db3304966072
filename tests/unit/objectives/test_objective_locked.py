"""LiT (Zhai et al. 2022): a locked tower's features come without a graph."""

import pytest
import torch

from mm_moe.batch import Batch
from mm_moe.models.configuration import MultimodalMoEConfig
from mm_moe.models.modeling import MultimodalMoEModel
from pretrain.contrastive import Contrastive
from tests.contract.test_backbones import TINY


def batch(rows: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 100, (rows, 5), generator=generator)
    ids[:, -1] = 1
    inputs = {
        "image": {"pixel_values": torch.randn(rows, 3, 64, 64, generator=generator)},
        "text": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
    }
    present = torch.ones(rows, 2, dtype=torch.bool)
    return Batch.of([str(i) for i in range(rows)], present, inputs)


@pytest.mark.parametrize("variant", ["gather", "chunked", "ring"])
@pytest.mark.parametrize(("locked", "free"), [("image", "text"), ("text", "image")])
def test_the_backward_pass_stays_out_of_the_locked_tower(locked, free, variant):
    torch.manual_seed(0)
    config = MultimodalMoEConfig(backbone_config=TINY["small_clip"], num_labels=0)
    model = MultimodalMoEModel(config)
    model.freeze(lock=(locked,))
    loss, _, output = Contrastive(variant=variant, chunk=3)(model, batch())
    assert not output.features[locked].requires_grad  # nothing of the tower is kept
    loss.backward()
    assert all(p.grad is None for p in model.backbone.towers[locked].parameters())
    assert any(p.grad.abs().sum() > 0 for p in model.backbone.towers[free].parameters())
    assert model.logit_scale.grad.abs() > 0
