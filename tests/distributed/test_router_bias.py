"""The balancing bias, the logged loads and the refusal of empty batches in real runs.

One process against two that share the experts and accumulate two micro-batches a step: the same
losses, biases and loads, and a resumed run ends with the same biases. No loss that is a mean over a
micro-batch's tokens takes part, since that would depend on how a batch is cut.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.harness import run_distributed
from tests.distributed.runs import column, read_run, train_here, write_recipe

pytestmark = pytest.mark.distributed
STEPS = 6


def command(folder, name, *more):
    moe = {"bias_update_rate": 0.01, "router_z_coef": 0.0, "load_balance_coef": 0.0, "top_k": 2}
    return [
        *("--config", write_recipe(folder), "--output_dir", str(folder / name)),
        *("--moe_config", json.dumps(moe), "--max_steps", str(STEPS), "--save_steps", "3"),
        *("--final_evaluation", "false", *more),
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bias")
    two = command(folder, "two", "--ep_size", "2", "--gradient_accumulation_steps", "2")
    run_distributed(train_here, 2, [two], timeout_s=300)
    start = str(folder / "two" / "checkpoint-3")
    one = command(folder, "one")
    again = command(folder, "again", "--resume_from_checkpoint", start)
    run_distributed(train_here, 1, [one, again], timeout_s=300)
    return {
        name: (read_run(folder / name), biases(folder / name)) for name in ("one", "two", "again")
    }


def biases(folder):
    weights = load_file(folder / "final" / "model.safetensors")
    return {name: steps_E for name, steps_E in weights.items() if name.endswith(".bias_steps")}


def test_biases_move_alike_in_every_layout_and_go_on_after_a_resume(runs):
    (one, bias), (two, bias_two), (_, bias_again) = (runs[n] for n in ("one", "two", "again"))
    assert column(two, "loss") == pytest.approx(column(one, "loss"), abs=1e-5)
    assert len(bias) == 4
    for name, steps_E in bias.items():
        assert steps_E.dtype == torch.int64
        assert 0 < steps_E.abs().max() <= STEPS  # once a step, however many micro-batches
        assert torch.equal(bias_two[name], steps_E)
        assert torch.equal(bias_again[name], steps_E)


def test_the_logged_loads_add_up_to_the_rows_routed_in_every_layout(runs):
    for entry, other in zip(runs["one"][0]["metrics"], runs["two"][0]["metrics"], strict=True):
        for layer in ("image.0", "image.1", "text.0", "text.1"):
            load = [entry[f"moe/{layer}/expert_{e}"] for e in range(4)]
            assert sum(load) == 2 * entry[f"moe/{layer}/tokens"]  # top_k 2, exactly
            assert load == [other[f"moe/{layer}/expert_{e}"] for e in range(4)]
            z = entry[f"moe/{layer}/router_z"]
            assert other[f"moe/{layer}/router_z"] == pytest.approx(z, rel=1e-4)
        both = [entry[f"moe/text.{block}/router_entropy"] for block in (0, 1)]
        assert entry["moe/text/router_entropy"] == pytest.approx(sum(both) / 2)


def refuse(rank, world_size):
    """What each rank says of a batch that no rank has a token of, and of one that the last has."""
    from mm_moe.batch import Batch
    from mm_moe.errors import DataError
    from mm_moe.moe.layer import RoutingRecord
    from mm_moe.training.trainer import refuse_empty

    routing = {"image.1": RoutingRecord(torch.zeros(2), {}, {"tokens": torch.zeros(())})}
    said = []
    for full_rank in (None, world_size - 1):
        present = torch.full((1, 2), rank == full_rank)
        try:
            refuse_empty(Batch.of([f"id-{rank}"], present, {}), routing)
            said.append("")
        except DataError as error:
            said.append(str(error))
    return said


def test_every_rank_refuses_a_batch_that_is_empty_everywhere():
    for rank, (empty, not_everywhere) in enumerate(run_distributed(refuse, 2)):
        assert f"1 samples of this process (first: 'id-{rank}') nor of the other 1" in empty
        assert not_everywhere == ""
