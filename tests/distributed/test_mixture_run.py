"""A run of the mixture autoencoder by the command line: refused flags, the curve, the folder."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel

from launch import prepare_data
from launch.cli import RecipeParser
from launch.own_models import check_own_model
from mm_moe.data.sets.prepared import DigitPairsData
from mm_moe.errors import ConfigError
from mm_moe.models.mixture import MixtureVAE
from tests.av_mnist_layouts import av_mnist
from tests.distributed.harness import run_distributed
from tests.distributed.runs import column, train_here

pytestmark = pytest.mark.distributed
RECIPE = ["--config", "pretrain/recipes/digits_mixture.yaml"]


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data"
    flags = ["--source", str(av_mnist(tmp_path / "raw")), "--output", str(folder)]
    assert prepare_data.main(["digit_pairs", *flags]) == 0
    return folder


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--prompt", "replay"], "--prompt replay does not go with"),
        (["--model_config", '{"latent": 3}'], "did you mean latent_size"),
        (["--model_config", '{"arrays": {}}'], "unknown option 'arrays'"),
        (["--objective", "contrastive"], "--model_config is for objectives"),
    ],
)
def test_flags_that_do_not_fit_are_refused(data, flags, words):
    values = RecipeParser().namespace([*RECIPE, *flags])
    with pytest.raises(ConfigError, match=words):
        check_own_model(values, DigitPairsData(str(data)), ep_size=1)


@pytest.mark.slow
def test_a_run_resumes_and_publishes(data, tmp_path):
    argv = [*RECIPE, "--data_dir", str(data), "--global_batch_size", "8", "--logging_steps", "1"]
    argv += ["--missing_type", "both", "--missing_ratio", "0.5", "--save_steps", "6"]
    argv += ["--max_steps", "12", "--eval_steps", "6"]
    folder = tmp_path / "run"
    argv += ["--output_dir", str(folder)]
    commands = [argv, [*argv, "--resume_from_checkpoint", str(folder / "checkpoint-6")]]
    (found,) = run_distributed(train_here, 1, commands, timeout_s=500)
    curve = column(found[0], "loss")
    assert len(curve) == 12
    assert column(found[1], "loss")[-6:] == pytest.approx(curve[-6:], rel=1e-5)
    bound = column(found[0], "eval_iwae_looser")
    assert len(bound) == 2
    assert column(found[0], "eval_loss") == [-value for value in bound]
    assert column(found[1], "eval_iwae_looser")[-1] == pytest.approx(bound[-1], rel=1e-5)
    quiet = [*argv[:-2], "--output_dir", str(tmp_path / "quiet"), "--eval_strategy", "no"]
    (other,) = run_distributed(train_here, 1, [quiet], timeout_s=500)
    assert column(other[0], "loss") == curve  # an evaluation changes nothing of the training
    model = AutoModel.from_pretrained(folder / "final")
    assert type(model) is MixtureVAE
    made = model.translate(torch.rand(2, 28, 28), source="audio", target="image")
    assert made.shape == (2, 28, 28)
