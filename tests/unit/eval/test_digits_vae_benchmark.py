"""Coherence of generated digits: scores that a pencil can check."""

import argparse

import pytest
import torch
from torch import nn

from eval.benchmarks.digits_vae import (
    Judges,
    MixtureVAE,
    chance,
    coherence,
    configuration,
    figures,
    fit_classifier,
    linear_accuracy,
    run_one,
)


class Says(nn.Module):
    """A classifier that always finds the same digit."""

    def __init__(self, digit: int) -> None:
        super().__init__()
        self.digit = digit

    def forward(self, rows):
        return torch.eye(10)[self.digit].expand(len(rows), 10)


def digits(count: int):
    labels = torch.arange(count) % 10
    values = {name: torch.rand(count, 4, 4) for name in ("image", "audio")}
    return values, labels


def test_classifiers_that_always_say_the_same():
    torch.manual_seed(0)
    data = digits(40)
    model = MixtureVAE(configuration(data, 8))
    same = coherence(model, {"image": Says(3), "audio": Says(3)}, data, data)
    assert same["joint"] == same["joint_chance"] == 100
    assert same["joint_digits"] == 1
    assert same["cross_image_to_audio"] == same["cross_audio_to_image"] == 10
    other = coherence(model, {"image": Says(3), "audio": Says(4)}, data, data)
    assert other["joint"] == other["joint_chance"] == 0


def test_a_digit_that_stands_in_the_latent_is_found():
    labels = torch.arange(60) % 10
    latents = torch.eye(10)[labels] + 0.05 * torch.randn(60, 10)
    assert linear_accuracy(latents, labels, latents, labels) == 100
    blind = linear_accuracy(torch.zeros(60, 10), labels, torch.zeros(60, 10), labels)
    assert blind == pytest.approx(10)


def test_figures_compare_the_methods_in_cross_coherence():
    row = {"cross_a_to_b": {"mean": 60.0}, "cross_b_to_a": {"mean": 40.0}, "joint": {"mean": 7.0}}
    less = row | {"cross_a_to_b": {"mean": 50.0}}
    found = figures({"dreg_looser": row, "elbo": less}, 11.0)
    assert found["cross_minus_elbo_points"] == pytest.approx(5)
    assert found["joint"] == 7
    assert chance(digits(20)) == 10


def test_a_run_from_rows_to_figures(tmp_path):
    """A few steps on toy rows; a finished training is read back, not trained again."""
    data = {"train": digits(80), "test": digits(20)}
    options = argparse.Namespace(quick=False, steps=2, hidden=4, partial=tmp_path)
    judges = Judges(data, epochs=1, partial=tmp_path)
    judges.models = {"image": Says(0), "audio": Says(1)}
    assert judges.accuracy() == {"image": 10.0, "audio": 10.0}
    found = run_one("elbo", 0, options, judges)
    assert found["cross_audio_to_image"] == 10
    again = Judges(data, epochs=1, partial=tmp_path)
    assert again.accuracy() == judges.accuracy()
    assert run_one("elbo", 0, options, again) == found
    fitted = fit_classifier(torch.rand(20, 4, 4), data["test"][1], epochs=1)
    assert fitted(torch.rand(2, 4, 4)).shape == (2, 10)
