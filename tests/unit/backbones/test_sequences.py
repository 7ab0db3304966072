import numpy as np
import pytest
import torch

from mm_moe.backbones.base import SequenceNeeds
from mm_moe.backbones.sequences import SequencesBackbone
from mm_moe.errors import ConfigError, DataError
from mm_moe.models.sequence_processing import SequenceProcessor

SETTINGS = {
    "width": 16,
    "num_blocks": 2,
    "num_heads": 2,
    "hidden": 24,
    "projection": 8,
    "sequences": {"sound": {"width": 4, "length": 7}, "face": {"width": 3, "length": 5}},
}


def backbone(**changes):
    torch.manual_seed(0)
    return SequencesBackbone(SETTINGS | changes, modalities=("sound", "face")).double()


def payload(lengths, *, width=4, longest=None):
    torch.manual_seed(1)
    longest = longest or max(lengths)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    values = torch.randn(len(lengths), 7, width, dtype=torch.float64)[:, :longest]
    return {"values": values.where(mask[..., None], 0.0), "mask": mask}


def test_padding_changes_nothing():
    model = backbone()
    alone = [model.encode("sound", payload([3])), model.encode("sound", payload([3], longest=6))]
    assert torch.allclose(alone[0][0], alone[1][0], atol=1e-12)
    dirty = payload([3], longest=6)
    dirty["values"][:, 3:] = 1e3
    assert torch.allclose(model.encode("sound", dirty)[0], alone[0][0], atol=1e-12)


def test_extra_pairs_are_seen_and_do_not_break_the_mask():
    model = backbone()
    tower = model.towers["sound"]
    x_NLD, mask_NL = tower.embed(payload([3, 5]))
    pairs = (torch.randn(2, 4, 16).double(), torch.randn(2, 4, 16).double())
    plain, _ = tower.block(0, x_NLD, mask_NL)
    with_pairs, _ = tower.block(0, x_NLD, mask_NL, pairs)
    assert not torch.allclose(plain, with_pairs)
    moved = x_NLD.clone()
    moved[0, 3:] += 1
    assert torch.equal(tower.block(0, moved, mask_NL, pairs)[0][0, :3], with_pairs[0, :3])


def test_every_parameter_learns():
    model = backbone()
    for name, width in (("sound", 4), ("face", 3)):
        model.encode(name, payload([2, 5], width=width))[0].square().sum().backward()
    for name, parameter in model.named_parameters():
        if "position" in name:
            assert parameter.grad[:5].abs().sum() > 0
        else:
            assert parameter.grad.abs().sum() > 0, name


def test_processor_standardises_real_steps_and_pads():
    needs = SequenceNeeds(width=2, length=3, mean=[1.0, 10], std=[2.0, 1])
    rows = [np.array([[3.0, 10], [1, 12]]), np.full((5, 2), 1.0)]
    found = SequenceProcessor(needs)([rows[0].astype("<f4").tobytes(), rows[1]])
    assert found["values"][0].tolist() == [[1, 0], [0, 2], [0, 0]]
    assert found["values"][1].tolist() == [[0, -9]] * 3
    assert found["mask"].tolist() == [[True, True, False], [True, True, True]]


def test_what_does_not_fit_is_named():
    process = SequenceProcessor(SequenceNeeds(width=2, length=3))
    with pytest.raises(DataError, match=r"of 12 bytes is not made of float32 steps of width 2"):
        process([b"123456789012"])
    with pytest.raises(DataError, match=r"shape \(2, 3\); the model takes \(T, 2\)"):
        process([np.zeros((2, 3))])
    with pytest.raises(ConfigError, match="needs the widths of the data"):
        SequencesBackbone({}, modalities=("text",))
    with pytest.raises(ConfigError, match="multiple of num_heads"):
        backbone(num_heads=3)
    with pytest.raises(ConfigError, match="width 0"):
        backbone(sequences={"sound": {"width": 0, "length": 1}})
    with pytest.raises(ConfigError, match="'smell'"):
        SequencesBackbone(SETTINGS, modalities=("smell",))
