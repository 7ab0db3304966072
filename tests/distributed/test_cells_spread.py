"""Species on different processes: the cell autoencoder of two ranks is that of one.

Human on rank 0, mouse on rank 1; cells lie anywhere. Losses, gradients and weights after three
optimizer steps, in float64, with adversaries, critics and cycle; one rank without a cell of a
species, and one without any.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from mm_moe.checkpoint.logical import full_weights, load_weights, trainable_tensors
from pretrain.mmvae import CellObjective
from tests.distributed.harness import run_distributed
from tests.unit.cells.cell_batches import batch, model

pytestmark = pytest.mark.distributed
CELLS = ("hmhhmhmm", "hhhmhhhh", "mmmmmmmm")  # of each step
SPLITS = (slice(0, 5), slice(5, 8)), (slice(0, 3), slice(3, 8)), (slice(0, 0), slice(0, 8))
PLAIN = {"kl_low": 0.5, "kl_high": 0.9, "kl_climb": 2, "balance": "genes"}
FULL = {
    **PLAIN,
    **{"adversary_weight": 2.0, "adversary_ramp": 2, "adversary_steps": 2},
    **{"critic_weight": 1.5, "critic_hidden": [4], "adversary_hidden": [5]},
    **{"cycle_weight": 0.3, "latent_cycle_weight": 0.2},
    **{
        "anchor_weight": 0.7,
        "anchors": {"human": ["human0", "human5"], "mouse": ["mouse3", "mouse0"]},
    },
}
KINDS: dict[str, dict[str, Any]] = {
    "nb": {"likelihood": "nb", "conditioner": "film"},
    "batch norm": {"likelihood": "mse", "expert_norm": "batch", "core_norm": "batch"},
}


def train(vae, objective, pieces, *, mean) -> list[dict[str, Any]]:
    """Three steps of plain SGD; gradients by `mean` over ranks, as DeepSpeed makes it."""
    found = []
    for piece in pieces:
        vae.zero_grad()
        loss, parts, _ = objective(vae, piece)
        loss.backward()
        mean(vae)
        figures = {name: float(value.detach()) for name, value in parts.items()}
        grads = {
            entry.name: entry.gather([part.grad for part in entry.parts]).clone()
            for entry in trainable_tensors(vae)
        }
        found.append({"loss": float(loss.detach()), "parts": figures, "grads": grads})
        with torch.no_grad():
            for parameter in vae.parameters():
                parameter -= 0.01 * parameter.grad
        objective.annealer.step()
    found.append({"weights": full_weights(vae, apart=True)})
    return found


def mean_over_ranks(vae) -> None:
    """What ZeRO does: sums over all, or over the holders of an expert, by the number of ranks."""
    from deepspeed.utils import groups

    for parameter in vae.parameters():
        group = None
        if not getattr(parameter, "allreduce", True):
            group = groups._get_expert_data_parallel_group(parameter.group_name)
        dist.all_reduce(parameter.grad, group=group)
        parameter.grad /= dist.get_world_size()


def on_rank(rank: int, world_size: int, kind: str, options: dict[str, Any], ep_size: int) -> Any:
    from mm_moe.moe.parallel import make_expert_parallel

    vae = model(**KINDS[kind]).train()
    make_expert_parallel(vae, ep_size=ep_size)
    objective = CellObjective(**options)
    objective.prepare(vae, device=torch.device("cpu"), seed=0)
    pieces = [batch(cells, rows=split[rank]) for cells, split in zip(CELLS, SPLITS, strict=True)]
    bytes_held = sum(p.numel() * 8 for p in vae.species.parameters())
    found = train(vae, objective, pieces, mean=mean_over_ranks)
    again = model(**KINDS[kind])
    make_expert_parallel(again, ep_size=ep_size)
    weights = found[-1]["weights"]
    load_weights(again, weights.__getitem__)
    same = all(
        torch.equal(mine, theirs)
        for mine, theirs in zip(again.state_dict().values(), vae.state_dict().values(), strict=True)
    )
    carried = {name: part.state_dict() for name, part in objective.carried().items()}
    return found, bytes_held, same, carried


@pytest.mark.parametrize(
    ("kind", "options", "ep_size"),
    [("nb", FULL, 2), ("batch norm", FULL, 2), ("batch norm", FULL, 1)],
)
def test_two_processes_equal_one(kind, options, ep_size):
    vae, objective = model(**KINDS[kind]).train(), CellObjective(**options)
    whole = sum(p.numel() * 8 for p in vae.species.parameters())
    objective.prepare(vae, device=torch.device("cpu"), seed=0)
    alone = train(vae, objective, [batch(cells) for cells in CELLS], mean=lambda vae: None)
    ranks = run_distributed(on_rank, 2, kind, options, ep_size)
    for step, expected in enumerate(alone[:-1]):
        found = [ranks[rank][0][step] for rank in range(2)]
        assert (found[0]["loss"] + found[1]["loss"]) / 2 == pytest.approx(
            expected["loss"], rel=1e-9
        )
        for name, value in expected["parts"].items():
            if name != "critic_auc":  # of the critics here
                mean = (found[0]["parts"][name] + found[1]["parts"][name]) / 2
                assert mean == pytest.approx(value, rel=1e-8, abs=1e-9), name
        for name, grad in expected["grads"].items():
            for rank in range(2):
                assert torch.allclose(found[rank]["grads"][name], grad, atol=1e-8), (step, name)
    for name, value in alone[-1]["weights"].items():
        for rank in range(2):
            assert torch.allclose(ranks[rank][0][-1]["weights"][name], value, atol=1e-9), name
    assert all(rank[2] for rank in ranks)  # what was gathered can be dealt out again
    for rank in ranks:
        if ep_size == 2:
            assert rank[1] < 0.7 * whole
    own = objective.carried()["adversary"].state_dict()["weights"]
    for rank in ranks:
        for name, value in own.items():
            assert torch.allclose(rank[3]["adversary"]["weights"][name], value, atol=1e-9)
    assert objective.anchor is not None
    for name, value in objective.anchor.held.state_dict()["weights"].items():
        for rank in ranks:
            assert torch.allclose(rank[3]["anchors"]["weights"][name], value, atol=1e-9), name
    theirs = ranks[0][3]["critics"] | ranks[1][3]["critics"]
    for rank in ranks:
        assert len(rank[3]["critics"]) == 2 // ep_size
    assert sorted(theirs) == ["human", "mouse"]
    for species, critic in objective.critics.held.items():
        for name, value in critic.state_dict()["weights"].items():
            assert torch.allclose(theirs[species]["weights"][name], value, atol=1e-9), name
