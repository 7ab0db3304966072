"""Fusion of features and the head, by hand."""

import pytest
import torch

from mm_moe.errors import ConfigError
from mm_moe.models import MultimodalMoEConfig, MultimodalMoEModel
from mm_moe.models.fusion import FusionSettings, LowRankFusion, new_head

torch.set_num_threads(1)
SMALL = {"width": 16, "num_blocks": 2, "hidden": 24, "projection": 8, "vocab_size": 50}


def test_low_rank_fusion_by_hand():
    fusion = LowRankFusion([1, 2], rank=2, size=1)
    with torch.no_grad():
        fusion.factors[0].copy_(torch.tensor([[[2.0], [1.0]], [[0.0], [3.0]]]))  # (R, D + 1, F)
        fusion.factors[1].copy_(torch.tensor([[[1.0], [0.0], [1.0]], [[1.0], [1.0], [0.0]]]))
        fusion.weight_1R.copy_(torch.tensor([[1.0, 10.0]]))
        fusion.bias_F.fill_(0.5)
    found = fusion([torch.tensor([[3.0]]), torch.tensor([[4.0, 5.0]])])
    # factor 0: (2*3 + 1) * (4 + 1) = 35; factor 1: 3 * (4 + 5) = 27; 35 + 10 * 27 + .5
    assert found.item() == 305.5
    absent = fusion([torch.tensor([[3.0]]), torch.zeros(1, 2)])  # the appended 1 alone: 1 and 0
    assert absent.item() == 7.5


def test_every_factor_is_registered_and_trained():
    head = new_head([3, 4], 5, FusionSettings(fusion="low_rank", rank=2, size=6, hidden=7))
    names = [name for name, _ in head.named_parameters()]
    assert [n for n in names if "factors" in n] == ["low_rank.factors.0", "low_rank.factors.1"]
    before = [p.detach().clone() for p in head.parameters()]
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    parts = [torch.randn(8, 3), torch.randn(8, 4)]
    torch.nn.functional.cross_entropy(head.fuse(parts), torch.arange(8) % 5).backward()
    optimizer.step()
    moved = [bool((p != b).any()) for p, b in zip(head.parameters(), before, strict=True)]
    assert moved == [True] * len(names)


@pytest.mark.parametrize("fusion", ["concat", "low_rank"])
def test_a_folder_keeps_the_head(tmp_path, fusion):
    config = MultimodalMoEConfig(
        backbone_config=SMALL, num_labels=3, fusion=fusion, fusion_rank=2, head_hidden_size=4
    )
    model = MultimodalMoEModel(config).eval()
    model.save_pretrained(tmp_path)
    again = MultimodalMoEModel.from_pretrained(tmp_path)
    for name, entry in model.head.state_dict().items():
        assert torch.equal(again.head.state_dict()[name], entry), name


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"fusion": "lowrank"}, "did you mean low_rank"),
        ({"fusion": "low_rank", "fusion_rank": 0}, "fusion_rank"),
        ({"head_hidden_size": -1}, "head_hidden_size"),
    ],
)
def test_settings_that_cannot_work_are_refused(fields, match):
    with pytest.raises(ConfigError, match=match):
        MultimodalMoEConfig(**fields)
