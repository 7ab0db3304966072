"""The planner's numbers of autoencoders, against counts by hand and recordings at other sizes."""

from __future__ import annotations

import json

import pytest
import torch

from launch import plan
from launch.plan_cells import Sizes, _small, record_cells
from launch.plan_record import record
from mm_moe.cells.configuration import CellVAEConfig
from mm_moe.models.mixture import MixtureVAE, MixtureVAEConfig
from pretrain.mmvae import CellObjective

pytest.importorskip("anndata", reason="pip install -e '.[single_cell]'")
from tests.cell_files import two_species

RECIPE = """\
# Human of 6 genes, mouse of 4.
dataset: cells
dataset_options: {files: {human: human.h5ad, mouse: mouse.h5ad}, sampler: longest}
objective: mmvae
model_config:
  {expert_hidden: [8], expert_width: 5, core_hidden: [], latent_size: 3, expert_norm: none,
   conditioner: none, likelihood: mse}
prompt: none
moe_enable: false
max_steps: 2
global_batch_size: 16
"""


def planned(tmp_path, *flags: str) -> dict:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    if not (tmp_path / "human.h5ad").exists():
        two_species(tmp_path)
    file = tmp_path / "plan.json"
    argv = ["--config", str(tmp_path / "recipe.yaml"), "--data_dir", str(tmp_path)]
    assert plan.main([*argv, "--gpu", "cpu", "--json", str(file), *flags]) == 0
    return json.loads(file.read_text())


def test_parameters_by_part_and_a_process_that_holds_one_species(tmp_path, capsys):
    alone = planned(tmp_path)
    # read 8G + 8, encoder 8 * 5 + 5, decoder 5 * 8 + 8, write 8G + G
    human, mouse = (17 * genes + 8 + 45 + 48 for genes in (6, 4))
    core = 2 * (5 * 3 + 3) + (3 * 5 + 5)
    counts = {name: part["trainable"] for name, part in alone["parameters"].items()}
    assert counts == {"human": human, "mouse": mouse, "core": core, "conditioner": 0}
    assert alone["rows"] == {"human": 8, "mouse": 8}
    weights = alone["memory"]["ZeRO-0"]["weights"]
    assert weights == 4 * (human + mouse + core)
    assert alone["memory"]["ZeRO-0"]["optimizer"] == 2 * weights
    assert alone["with_activation_checkpointing"] is None
    spread = planned(tmp_path, "--world_size", "2", "--ep_size", "2")
    assert spread["memory"]["ZeRO-0"]["weights"] == 4 * (human + core)
    # of its expert a process has all moments, of the core's 45 weights and 11 biases half; flat
    # groups are filled up: 176 + 28 (from 27), and halves of 48 and 12
    assert spread["memory"]["ZeRO-1"]["optimizer"] == 12 * (176 + 28 + 24 + 6)
    assert spread["traffic"]["expert all-to-all"]["near"] > 0
    assert "expert(s) of human, 203 of its 259 parameters" in capsys.readouterr().out


CONFIG = CellVAEConfig(
    modalities=["human", "mouse"],
    genes={"human": [str(n) for n in range(300)], "mouse": [str(n) for n in range(170)]},
    expert_hidden=[9],
    expert_width=7,
    core_hidden=[6],
    latent_size=4,
)
FULL = {"adversary_weight": 1.0, "critic_weight": 1.0, "cycle_weight": 0.1}


ANCHORED = {"anchor_weight": 1.0, "anchor_steps": 2}  # the same name: 170 genes


@pytest.mark.parametrize(
    "options", [ANCHORED, pytest.param(FULL, marks=pytest.mark.slow)], ids=["anchored", "full"]
)
def test_bytes_at_small_sizes_say_those_at_larger_ones(options):
    def objective() -> CellObjective:
        return CellObjective(**options, critic_hidden=[5], adversary_hidden=[5])

    line = record_cells(
        CONFIG, objective, entries={"human": 30, "mouse": 20}, ep_size=1, half=False
    )
    rows = {"human": 64, "mouse": 40}
    anchors = 170 if "anchor_weight" in options else 0
    sizes = Sizes({"human": 300, "mouse": 170}, rows, {"human": 30, "mouse": 20}, rows, anchors)
    with torch.random.fork_rng(devices=[]):
        real = record(
            _small(CONFIG, objective(), sizes, held=("human", "mouse"), ep_size=1, half=False)
        )
    assert max(line.live(0, rows)) == pytest.approx(max(real.live), rel=1e-6)
    assert line.flops(0, rows) == pytest.approx(real.flops, rel=1e-6)
    assert [name for _, name in line.marks] == [name for _, name in real.marks]


def test_a_mixture_autoencoder_is_planned(tmp_path, monkeypatch):
    from launch.plan_own import OwnPlanner

    config = MixtureVAEConfig(
        modalities=["a", "b"],
        arrays={"a": {"shape": [30]}, "b": {"shape": [20]}},
        latent_size=3,
        networks={"a": {"hidden": [11]}, "b": {"hidden": [11]}},
    )
    planner = object.__new__(OwnPlanner)
    planner.model, planner.config, planner.half = MixtureVAE(config), config, False
    from pretrain.mixture import MixtureObjective

    monkeypatch.setattr(planner, "_objective", lambda: MixtureObjective(samples=2), raising=False)
    line = planner.timeline(recompute_every=0)
    one, two = max(line.live(50, {})), max(line.live(100, {}))
    assert 1.9 < two / one < 2.1
    assert line.flops(100, {}) == pytest.approx(2 * line.flops(50, {}), rel=1e-6)
