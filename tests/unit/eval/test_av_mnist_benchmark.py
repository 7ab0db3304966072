"""The AV-MNIST benchmark on toy rows: every model is trained and scored, gains are paired."""

import pytest
import torch

from eval.benchmarks.av_mnist import STAGE_1, STAGE_2, figures, run_seed


def toy(count: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 10
    values = {
        "image": torch.randn(count, 8, 8, generator=generator),
        "audio": torch.randn(count, 4, 4, generator=generator),
    }
    values["image"][:, 0, 0] += 3 * labels
    return values, labels


def test_every_model_of_both_stages_is_scored():
    data = {"train": toy(128, 0), "validation": toy(20, 1), "test": toy(30, 2)}
    found = run_seed(data, seed=0, epochs=(1, 1))
    assert list(found) == [*STAGE_1, *STAGE_2]
    for row in found.values():
        assert 0 <= row["test"] <= 100
        assert (row["test"] * 30 / 100) == pytest.approx(round(row["test"] * 30 / 100))


def test_gains_by_hand():
    seeds = [
        {"intra": 60, "inter concat": 70, "inter low_rank": 65, "i2m2 concat": 71},
        {"intra": 64, "inter concat": 69, "inter low_rank": 66, "i2m2 concat": 73},
    ]
    more = {"i2m2 low_rank": 70, "inter concat longer": 70, "inter low_rank longer": 70}
    rows = [{k: {"test": float(v)} for k, v in (s | more).items()} for s in seeds]
    found = figures({"i2m2 concat": {"test": {"mean": 72.0}}}, rows)
    assert found["i2m2_concat_minus_intra_points"] == 10.0  # 11 and 9
    assert found["i2m2_concat_minus_inter_concat_points"] == 2.5  # 1 and 4
    assert found["i2m2_concat_minus_inter_concat_longer_points"] == 2.0  # 1 and 3
    assert found["i2m2_low_rank_minus_inter_low_rank_std"] == pytest.approx(0.5**0.5)  # 5 and 4
    assert found["i2m2_concat_accuracy"] == 72.0
