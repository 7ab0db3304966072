"""Runs of the cell autoencoder by the command line: placed by species, resumed, published."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModel

from launch.cli import RecipeParser
from launch.own_models import check_own_model
from mm_moe.cells.modeling import CellVAE
from mm_moe.data.sets.cells import CellsData
from mm_moe.errors import ConfigError, ParallelismError
from tests.distributed.harness import run_distributed
from tests.distributed.runs import column, train_here

pytest.importorskip("anndata", reason="pip install -e '.[single_cell]'")
from tests.cell_files import two_species

pytestmark = pytest.mark.distributed
RECIPE = """\
# A run of seconds.
dataset: cells
dataset_options:
  {files: {human: human.h5ad, mouse: mouse.h5ad}, conditions: [donor], shares: [0.6, 0.3, 0.1]}
objective: mmvae
model_config:
  {expert_hidden: [8], expert_width: 6, core_hidden: [5], latent_size: 3, dropout: 0.0}
objective_config:
  {kl_low: 0.1, kl_climb: 4, adversary_weight: 1.0, adversary_ramp: 3, adversary_hidden: [6],
   critic_weight: 0.5, critic_hidden: [5], cycle_weight: 0.1, latent_cycle_weight: 0.1}
prompt: none
moe_enable: false
max_steps: 8
learning_rate: 1.0e-2
global_batch_size: 4
weight_decay: 0.01
max_grad_norm: 5.0
logging_steps: 1
save_steps: 4
"""


@pytest.fixture
def argv(tmp_path) -> list[str]:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    data = two_species(tmp_path / "data")
    return ["--config", str(tmp_path / "recipe.yaml"), "--data_dir", str(data)]


@pytest.mark.parametrize(
    ("flags", "error", "words"),
    [
        (["--prompt", "replay"], ConfigError, "--prompt replay does not go with"),
        (["--moe_enable", "true"], ConfigError, "--moe_enable true does not go with"),
        (["--model_config", '{"latent": 3}'], ConfigError, "did you mean latent_size"),
        (["--model_config", '{"genes": {}}'], ConfigError, "unknown model_config 'genes'"),
        (["--objective", "contrastive"], ConfigError, "--model_config is for objectives"),
        (["--ep_size", "2"], ParallelismError, "possible: 1"),
    ],
)
def test_flags_that_do_not_fit_are_refused(argv, flags, error, words):
    values = RecipeParser().namespace([*argv, *flags])
    source = CellsData(values.data_dir)
    with pytest.raises(error, match=words):
        check_own_model(values, source, ep_size=1)


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero1", "zero2"])
def test_two_processes_follow_the_curve_of_one_and_resume_anywhere(argv, tmp_path, zero):
    argv = [*argv, "--deepspeed", f"ds_configs/{zero}.json"]
    argv += ["--eval_strategy", "steps", "--eval_steps", "4", "--per_device_eval_batch_size", "3"]

    def run(name: str, *more: str) -> list[str]:
        return [*argv, "--output_dir", str(tmp_path / name), *more]

    def again(name: str, run_of: str) -> list[str]:
        place = tmp_path / run_of / "checkpoint-4"
        return [*argv, "--output_dir", str(tmp_path / name), "--resume_from_checkpoint", str(place)]

    (alone,) = run_distributed(train_here, 1, [run("alone")], timeout_s=400)
    two: list[list[dict[str, Any]]] = run_distributed(
        train_here, 2, [run("two", "--ep_size", "2")], timeout_s=400
    )
    expected = column(alone[0], "loss")
    assert len(expected) == 8
    assert column(two[0][0], "loss") == pytest.approx(expected, rel=1e-4)
    assert column(two[0][0], "grad_norm") == pytest.approx(column(alone[0], "grad_norm"), rel=1e-3)
    held_out = ("loss", "reconstruction", "human_reconstruction", "mouse_reconstruction")
    for name in (*held_out, "kl_nats"):
        scores = column(alone[0], f"eval_{name}")
        assert len(scores) == 2
        assert column(two[0][0], f"eval_{name}") == pytest.approx(scores, rel=1e-4), name
    # one process goes on from the checkpoint of two, two from that of one
    (one,) = run_distributed(train_here, 1, [again("two", "two")], timeout_s=400)
    other = run_distributed(
        train_here, 2, [[*again("alone", "alone"), "--ep_size", "2"]], timeout_s=400
    )
    for found in (one[0], other[0][0]):
        assert column(found, "loss")[-4:] == pytest.approx(expected[-4:], rel=1e-4)
        for name in ("loss/adversary", "loss/critic", "loss/kl"):
            assert column(found, name)[-4:] == pytest.approx(column(alone[0], name)[-4:], rel=1e-3)
    vae = AutoModel.from_pretrained(tmp_path / "two" / "final")
    assert type(vae) is CellVAE
    assert vae.config.genes["mouse"] == ["g0", "g1", "g2", "g3"]
    assert vae.translate(torch.ones(2, 6), "human", "mouse", {"donor": "mouse-1"}).shape == (2, 4)
