"""Whole runs on DeepSpeed's own layer: the curve of ours, checkpoints and a folder that ours read.

Two choices without a capacity, since any other setting stops at some batch that lacks a modality;
no balance loss, the one part of the loss that the two layers define differently.
"""

from __future__ import annotations

import pytest
import torch

from tests.distributed.harness import run_distributed
from tests.distributed.runs import column, train_here, write_recipe

pytestmark = pytest.mark.distributed
STEPS, SAVED = 8, 4
STOCK = ("--moe_backend", "deepspeed")
LIGHT = ("--final_evaluation", "false", "--save_strategy", "no")


def command(folder, name, *more, ep_size=2):
    return [
        *("--config", write_recipe(folder), "--deepspeed", "ds_configs/zero2.json"),
        *("--output_dir", str(folder / name), "--ep_size", str(ep_size)),
        *("--top_k_experts", "2", "--router_z_loss_coef", "0", "--router_aux_loss_coef", "0"),
        *("--max_steps", str(STEPS), "--save_steps", str(SAVED), *more),
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs by name; those that resume start from step SAVED of the stock run."""
    folder = tmp_path_factory.mktemp("stock")
    point = ("--resume_from_checkpoint", str(folder / "stock" / f"checkpoint-{SAVED}"), *LIGHT)
    named = {
        "ours": command(folder, "ours", *LIGHT),
        "stock": command(folder, "stock", *STOCK, "--final_evaluation", "false"),
        "resumed": command(folder, "resumed", *STOCK, *point),
    }
    found = dict(
        zip(
            named,
            run_distributed(train_here, 2, list(named.values()), timeout_s=300)[0],
            strict=True,
        )
    )
    alone = command(folder, "alone", *point, ep_size=1)
    found["resumed as ours"] = run_distributed(train_here, 1, [alone], timeout_s=300)[0][0]
    return folder, found


def test_the_stock_layer_follows_our_curve(runs):
    _, found = runs
    losses = column(found["ours"], "loss")
    assert len(losses) == STEPS
    assert max(losses) - min(losses) > 1e-2
    assert column(found["stock"], "loss") == pytest.approx(losses, abs=1e-5)
    assert column(found["stock"], "grad_norm") == pytest.approx(
        column(found["ours"], "grad_norm"), rel=1e-4
    )
    entropy = "moe/image.1/router_entropy"
    assert column(found["stock"], entropy) == pytest.approx(
        column(found["ours"], entropy), abs=1e-5
    )


@pytest.mark.parametrize(("name", "tolerance"), [("resumed", 0), ("resumed as ours", 1e-5)])
def test_its_checkpoint_goes_on_here_and_there(runs, name, tolerance):
    _, found = runs
    expected = column(found["stock"], "loss")[SAVED:]
    assert column(found[name], "loss") == pytest.approx(expected, abs=tolerance)


def test_its_folder_holds_the_last_weights_under_our_names(runs):
    from mm_moe.checkpoint import store
    from mm_moe.models.modeling import MultimodalMoEModel

    folder, _ = runs
    model = MultimodalMoEModel.from_pretrained(folder / "stock" / "final")
    assert model.config.moe["top_k"] == 2
    state = model.state_dict()
    assert any(name.endswith("experts.w_in") and len(state[name]) == 4 for name in state)
    read = store.reader(folder / "stock" / f"checkpoint-{STEPS}" / store.WEIGHTS)
    assert all(torch.equal(value, read(name)) for name, value in state.items())
