"""Held-out scores over two processes are those of one, whoever holds cells and experts."""

from __future__ import annotations

from typing import Any

import pytest

from mm_moe.batch import Batch
from mm_moe.training.held_out import held_out_means
from pretrain.mmvae import CellObjective
from tests.distributed.harness import run_distributed
from tests.unit.cells.cell_batches import batch, model

pytestmark = pytest.mark.distributed
CELLS = "hmhhhmhh"
# batches of each rank: uneven ones; all on one rank; no mouse on one rank
DEALS: list[tuple[list[slice], list[slice]]] = [
    ([slice(0, 3), slice(6, 7)], [slice(3, 6), slice(7, 8), slice(8, 8)]),
    ([], [slice(0, 5), slice(5, 8)]),
    ([slice(6, 8)], [slice(0, 6)]),
]
KINDS: dict[str, Any] = {"expert_norm": "batch", "core_norm": "batch", "dropout": 0.5}


def cells(rows: slice) -> Batch:
    found = batch(CELLS, rows=rows)
    return Batch.of(found["ids"], found["present"], found["inputs"])


def on_rank(rank: int, world_size: int, ep_size: int) -> list[dict[str, float]]:
    from mm_moe.moe.parallel import make_expert_parallel

    vae = model(**KINDS).train()
    make_expert_parallel(vae, ep_size=ep_size)
    found = [
        held_out_means(CellObjective(), vae, map(cells, deal[rank]), num_modalities=2)
        for deal in DEALS
    ]
    assert vae.training
    return found


@pytest.mark.parametrize("ep_size", [1, 2])
def test_two_processes_score_as_one(ep_size):
    vae = model(**KINDS).train()
    expected = held_out_means(CellObjective(), vae, [cells(slice(0, 8))], num_modalities=2)
    assert len(expected) == 5
    for rank in run_distributed(on_rank, 2, ep_size):
        for found in rank:
            assert found == pytest.approx(expected, rel=1e-12)
