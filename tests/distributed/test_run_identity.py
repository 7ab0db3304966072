"""One run, any layout: the same losses, clip norms and scores on 1 and 2 processes, and on resume.

The runs go through everything that `deepspeed launch/train.py` does after its start.
"""

from __future__ import annotations

import pytest

from tests.distributed.harness import run_distributed
from tests.distributed.runs import column, train_here, write_recipe

pytestmark = pytest.mark.distributed
STAGES = ("zero0", "zero1", "zero2", "zero2_offload")
SCORED = "zero2"  # scores and checkpoints are compared at one stage, losses at all
LIGHT = ("--final_evaluation", "false", "--save_strategy", "no")


def command(folder, name, *, stage="zero2", ep_size=1, more=()):
    return [
        *("--config", write_recipe(folder), "--deepspeed", f"ds_configs/{stage}.json"),
        *("--output_dir", str(folder / name), "--ep_size", str(ep_size), *more),
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Every layout's run by (processes, ep_size, stage)."""
    folder = tmp_path_factory.mktemp("identity")
    found = {}
    for world, sizes in ((1, (1,)), (2, (1, 2))):
        cells = [(world, ep_size, stage) for ep_size in sizes for stage in STAGES]
        commands = [
            command(
                folder,
                f"{world}-{ep_size}-{stage}",
                stage=stage,
                ep_size=ep_size,
                more=() if stage == SCORED else LIGHT,
            )
            for world, ep_size, stage in cells
        ]
        results = run_distributed(train_here, world, commands, timeout_s=400)[0]
        found.update(zip(cells, results, strict=True))
    return folder, found


CELLS = [(w, e, s) for w, e in ((1, 1), (2, 1), (2, 2)) for s in STAGES]


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_every_layout_follows_one_curve(runs, cell):
    reference, result = runs[1][(1, 1, "zero2")], runs[1][cell]
    losses = column(reference, "loss")
    assert len(losses) == 20
    assert column(result, "loss") == pytest.approx(losses, abs=1e-5)
    norms = column(reference, "grad_norm")
    assert max(norms) > 0.1, "the clip must act for the test to mean anything"
    assert column(result, "grad_norm") == pytest.approx(norms, rel=1e-4)
    if cell[2] != SCORED:
        return
    assert result["scores"]["num_rows"] == reference["scores"]["num_rows"]
    for condition, metrics in reference["scores"]["models"]["replay"].items():
        assert result["scores"]["models"]["replay"][condition] == pytest.approx(metrics, abs=3e-3)


def test_blocks_that_are_computed_twice_follow_the_same_curve(runs):
    folder, found = runs
    argv = command(
        folder,
        "recomputed",
        ep_size=2,
        more=(*LIGHT, "--activation_checkpointing", "true", "--router", "topk_softmax"),
    )
    result = run_distributed(train_here, 2, [argv], timeout_s=300)[0][0]
    assert column(result, "loss") == column(found[(2, 2, "zero2")], "loss")
    assert column(result, "moe/load_imbalance") == column(
        found[(2, 2, "zero2")], "moe/load_imbalance"
    )


def test_the_curve_moves(runs):
    losses = column(runs[1][(1, 1, "zero2")], "loss")
    assert abs(losses[0] - losses[-1]) > 1e-3


@pytest.mark.parametrize(("world", "ep_size", "stage"), [(2, 2, "zero2"), (1, 1, "zero1")])
def test_resume_goes_on_with_the_same_curve_at_any_layout(runs, tmp_path, world, ep_size, stage):
    folder, found = runs
    start = folder / "2-2-zero2" / "checkpoint-10"
    argv = command(
        folder,
        f"resumed-{world}-{stage}",
        stage=stage,
        ep_size=ep_size,
        more=(*LIGHT, "--resume_from_checkpoint", str(start)),
    )
    result = run_distributed(train_here, world, [argv], timeout_s=300)[0][0]
    assert [entry["step"] for entry in result["metrics"]] == list(range(11, 21))
    expected = column(found[(2, 2, "zero2")], "loss")[10:]
    tolerance = 0 if world == 2 else 1e-5
    assert column(result, "loss") == pytest.approx(expected, abs=tolerance)
    assert column(result, "learning_rate") == column(found[(2, 2, "zero2")], "learning_rate")[10:]
