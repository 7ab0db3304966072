"""The rungs of the cell autoencoder's ablation, and a plain loop that trains one of them.

N cells of a batch.
"""

from __future__ import annotations

import math
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from eval.cell_tables import Tables, batch_of
from mm_moe.batch import Batch
from mm_moe.cells.configuration import CellVAEConfig
from mm_moe.cells.modeling import CellVAE
from pretrain.mmvae import CellObjective

ADVERSARY = {
    "adversary_weight": 50.0,
    "adversary_steps": 4,
    "adversary_learning_rate": 3e-3,
}
CRITICS = {"critic_weight": 1.0, "critic_real": "cis", "critic_auc": 0.9}
CYCLE = {"latent_cycle_weight": 1.0, "cycle_weight": 0.1}
ANCHOR_WEIGHT = 1000.0
# As in the source; with layer norm an adversary of this weight empties the latent.
NORMS = {"expert_norm": "batch", "core_norm": "batch"}
WARMUP, MAX_NORM = 20, 100.0


@dataclass(frozen=True)
class Rung:
    """A model of the ablation.

    Attributes:
        model: options of `CellVAEConfig`.
        objective: options of `CellObjective`.
        anchors: pairs of genes that it is told.
    """

    model: Mapping[str, Any] = field(default_factory=dict)
    objective: Mapping[str, Any] = field(default_factory=dict)
    anchors: int = 0


# "plain" has an expert for each species around one core. Those with a + have all that those before
# them have, and none of them is told of a gene that is the same in both species.
RUNGS = {
    "plain": Rung({"conditioner": "none"}),
    "+ condition banks": Rung(),
    "+ adversary": Rung({}, ADVERSARY),
    "+ critics": Rung({}, {**ADVERSARY, **CRITICS}),
    "+ cycle": Rung({}, {**ADVERSARY, **CRITICS, **CYCLE}),
    "50 anchors": Rung(anchors=50),
    "adversary, 10 anchors": Rung({}, ADVERSARY, 10),
    "adversary, 50 anchors": Rung({}, ADVERSARY, 50),
    "all, 50 anchors": Rung({}, {**ADVERSARY, **CRITICS, **CYCLE}, 50),
}


def batches(tables: Tables, *, size: int, seed: int) -> Iterator[Batch]:
    """Endless batches with equally many cells of each species, each in passes of its own."""
    rng = np.random.default_rng(seed)
    lines = {name: _places(len(table), rng) for name, table in tables.items()}
    own = size // len(tables)
    while True:
        places = {name: np.array([next(line) for _ in range(own)]) for name, line in lines.items()}
        yield batch_of({name: tables[name].rows(places[name]) for name in tables})


def _places(count: int, rng: np.random.Generator) -> Iterator[int]:
    while True:
        yield from rng.permutation(count)


def train(
    tables: Tables,
    rung: Rung,
    *,
    seed: int,
    steps: int,
    batch: int,
    learning_rate: float,
    options: Mapping[str, Any],
    objective: Mapping[str, Any],
    conditions: Mapping[str, Any] | None = None,
    anchors: Mapping[str, list[str]] | None = None,
) -> tuple[CellVAE, float]:
    """Fit a model, and return the seconds of processor time that its steps took.

    Args:
        tables: the training cells.
        rung: what the model and its objective have.
        seed: of weights, draws and the order of cells.
        steps: of Adam, with a cosine schedule.
        batch: cells of a step, of all species.
        learning_rate: at its height.
        options: sizes of the model.
        objective: options that all rungs share.
        conditions: column -> labels, or species -> labels.
        anchors: species -> genes that mean the same, for a rung that is told some.
    """
    torch.manual_seed(seed)
    model = CellVAE(
        CellVAEConfig(
            modalities=list(tables),
            genes={name: list(table.genes) for name, table in tables.items()},
            conditions=dict(conditions or {}),
            **{**NORMS, **options, **rung.model},
        )
    ).train()
    told = {"anchor_weight": ANCHOR_WEIGHT, "anchors": dict(anchors)} if anchors else {}
    aim = CellObjective(**{**objective, **rung.objective, **told, "seed": seed})
    aim.prepare(model, device=torch.device("cpu"), seed=seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    stream = batches(tables, size=batch, seed=seed)
    begin = time.process_time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * _schedule(step, steps)
        loss = aim(model, next(stream))[0]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        aim.annealer.step()
    return model.eval(), time.process_time() - begin


def _schedule(step: int, steps: int) -> float:
    """A short climb, then a cosine to 0."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return (1 + math.cos(math.pi * (step - WARMUP) / max(steps - WARMUP, 1))) / 2


def in_turn(
    work: Callable[[tuple[str, int]], dict[str, Any]],
    tasks: Sequence[tuple[str, int]],
    *,
    jobs: int,
) -> Iterator[dict[str, Any]]:
    """The row of each (model, seed) as it is done; in processes that share what is loaded."""
    if jobs < 2:
        yield from map(work, tasks)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        for done in as_completed([pool.submit(work, task) for task in tasks]):
            yield done.result()


def table_of(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Model -> score -> mean and standard deviation over its seeds."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row["short"] for row in rows if row["model"] == name]
        found[name] = {
            score: {
                "mean": statistics.fmean(one[score] for one in own),
                "sd": statistics.stdev(one[score] for one in own) if len(own) > 1 else 0.0,
            }
            for score in own[0]
            if all(one.get(score) is not None for one in own)
        }
    return found


def show(rows: Sequence[Mapping[str, Any]], tell: Callable[[str], None]) -> None:
    """One line for each model."""
    for name, own in table_of(rows).items():
        values = "  ".join(f"{s} {v['mean']:.3f} ({v['sd']:.3f})" for s, v in own.items())
        tell(f"{name:18} {values}")
