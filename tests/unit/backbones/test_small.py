"""The small encoders: published sizes, padding, and batch normalisation."""

import pytest
import torch
from torch import nn

from mm_moe.backbones.small import SmallBackbone
from mm_moe.errors import ConfigError, DataError
from mm_moe.models import MultimodalMoEConfig, MultimodalMoEModel
from mm_moe.moe.batch_norm import BatchNorm

torch.set_num_threads(1)
AV = {"arrays": {"image": {"shape": [28, 28]}, "audio": {"shape": [112, 112]}}}
MIMIC = {"sequences": {"static": {"width": 5, "length": 1}, "series": {"width": 12, "length": 24}}}


def test_encoders_have_the_published_widths():
    lenets = SmallBackbone(AV, modalities=("image", "audio"))
    assert [lenets.feature_width(m) for m in ("image", "audio")] == [24, 96]
    wide = {"towers": {"image": {"channels": 6}, "audio": {"channels": 6}}}
    lenets = SmallBackbone(AV | wide, modalities=("image", "audio"))
    assert sum(map(lenets.feature_width, ("image", "audio"))) == 240
    gru = SmallBackbone(MIMIC, modalities=("static", "series"))
    assert [gru.feature_width(m) for m in ("static", "series")] == [10, 360]
    states = MIMIC | {"towers": {"series": {"step_size": 0}}}
    gru = SmallBackbone(states, modalities=("static", "series"))
    assert sum(map(gru.feature_width, ("static", "series"))) == 730


def test_a_head_takes_features_of_different_widths():
    config = MultimodalMoEConfig(
        backbone="small",
        backbone_config=MIMIC,
        modalities=["static", "series"],
        num_labels=6,
        head_hidden_size=40,
        feature_norm=False,
    )
    head = MultimodalMoEModel(config).head
    assert [tuple(p.shape) for p in head.parameters()] == [(40, 370), (40,), (6, 40), (6,)]


def test_padding_and_what_stands_on_it_do_not_matter():
    backbone = SmallBackbone(MIMIC, modalities=("series",)).eval()
    values = torch.randn(1, 3, 12)
    mask = torch.ones(1, 3, dtype=torch.bool)
    short, _ = backbone.encode("series", {"values": values, "mask": mask})
    longer = torch.cat([values, torch.full((1, 2, 12), 7.0)], 1)
    mask = torch.cat([mask, torch.zeros(1, 2, dtype=torch.bool)], 1)
    padded, _ = backbone.encode("series", {"values": longer, "mask": mask})
    assert torch.allclose(short, padded)
    assert not short[:, 3 * 15 :].any()


def test_batch_norm_is_that_of_torch():
    torch.manual_seed(0)
    ours, theirs = BatchNorm(3).double(), nn.BatchNorm2d(3).double()
    ours.sum_over_ranks = lambda totals: totals  # the path of several processes, with one
    for _ in range(2):
        x = torch.randn(5, 3, 4, 2, dtype=torch.float64)
        assert torch.allclose(ours(x), theirs(x), atol=1e-12)
    assert torch.allclose(ours.running_mean_C, theirs.running_mean, atol=1e-12)
    assert torch.allclose(ours.running_var_C, theirs.running_var, atol=1e-12)
    assert torch.allclose(ours.eval()(x), theirs.eval()(x), atol=1e-12)


def test_a_blank_row_leaves_the_statistics_alone():
    backbone = SmallBackbone(AV, modalities=("image",)).train()
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    feature, _ = backbone.encode("image", None)
    feature.sum().backward()
    assert all(p.grad is not None for p in backbone.parameters())
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({}, "av_mnist"),
        (AV | {"num_blocks": -1}, "num_blocks"),
        (AV | {"towers": {"image": {"kind": "lenet"}}}, "unknown kind 'lenet'"),
        (AV | {"towers": {"image": {"chanels": 3}}}, "did you mean channels"),
        (AV | {"towers": {"image": {"layers": 4}}}, "take layers up to 3"),
        (AV | {"towers": {"image": {"kind": "gru", "hidden": 0}}}, "at least 1"),
        ({"towers": {"image": {"channels": 3}}}, "image_size"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, match):
    with pytest.raises(ConfigError, match=match):
        SmallBackbone(settings, modalities=("image",))


def test_prompts_need_attention():
    config = MultimodalMoEConfig(
        backbone="small", backbone_config=AV | {"num_blocks": 1}, modalities=["image"], num_labels=2
    )
    MultimodalMoEModel(config)
    config.prompt = "missing_aware"
    with pytest.raises(ConfigError, match="no blocks that a prompt"):
        MultimodalMoEModel(config)


def test_rows_of_another_shape_are_named():
    backbone = SmallBackbone(AV, modalities=("image",))
    with pytest.raises(DataError, match=r"\(14, 28\)"):
        backbone.encode("image", {"values": torch.zeros(2, 14, 28)})
