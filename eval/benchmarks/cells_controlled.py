"""The cell autoencoder's ablation on drawn cells whose counterfactual is known.

    python -m eval.benchmarks.cells_controlled            # three seeds, stored
    python -m eval.benchmarks.cells_controlled --quick    # a few steps: does it run?

A seed draws a world, training and test cells, and the model (see `eval.benchmarks.cells_drawn`).
`truth_gene_r` is the mean over genes of the r, over test cells, between what `translate` says of a
cell in the other species and what the same latent is there; a translation that says the same of
every cell has no r, and one that takes types for each other a low one. `truth_cell_r` is the mean
over cells of the r over genes, when each gene's true mean is taken off both. `known_gene_r` bounds
them: the same of the model's own reconstruction against the expectation without the noise.

The last line is one JSON object; rows are stored as they are done.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from typing import Any

import numpy as np
import torch

from eval.benchmarks.cells_drawn import World
from eval.benchmarks.cells_training import RUNGS, in_turn, show, table_of, train
from eval.benchmarks.moe_layer import RESULTS, describe_machine
from eval.cell_tables import translated
from eval.generation_scores import mean, pearson
from eval.integration import finite, headline, scores

SIZES = {
    "expert_hidden": [64],
    "expert_width": 32,
    "core_hidden": [32],
    "latent_size": 6,
    "likelihood": "nb",
}
OBJECTIVE = {"kl_low": 0.0, "kl_climb": 100, "balance": "genes", "adversary_ramp": 100}
TEST_CELLS = 500


def against_truth(made: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """R of translated cells and their known counterfactual, (N, G) both."""
    centre = truth.mean(0)
    return {
        "truth_gene_r": mean(pearson(truth, made, axis=0)),
        "truth_cell_r": mean(pearson(truth - centre, made - centre, axis=1)),
    }


def run(task: tuple[str, int], *, args: Any) -> dict[str, Any]:
    """Draw, train and score one rung with one seed."""
    name, seed = task
    world = World(seed)
    known, asked = world.draw(args.cells, seed=seed), world.draw(TEST_CELLS, seed=seed + 1000)
    model, seconds = train(
        known.tables,
        RUNGS[name],
        seed=seed,
        steps=args.steps,
        batch=args.batch,
        learning_rate=args.learning_rate,
        options=SIZES,
        objective=OBJECTIVE,
        conditions={"donor": known.donors},
        anchors=world.anchors(RUNGS[name].anchors) if RUNGS[name].anchors else None,
    )
    found, _ = scores(model, asked.tables, critics=False)
    human, mouse = asked.tables
    both = [
        against_truth(translated(model, asked.tables[a], a, b), asked.crossed[a])
        for a, b in ((human, mouse), (mouse, human))
    ]
    truth = {score: float(np.mean([one[score] for one in both])) for score in both[0]}
    short = {**truth, **headline(found)}
    return {"model": name, "seed": seed, "cpu_s": seconds, "short": short, **found}


def figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Cross-generation against the truth, by rung."""
    return {
        f"truth_gene_r {name}": scores["truth_gene_r"]["mean"]
        for name, scores in table_of(rows).items()
        if "truth_gene_r" in scores
    }


def main() -> None:
    """Train, score, print and store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few steps, one seed; not stored")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", choices=list(RUNGS), default=list(RUNGS))
    parser.add_argument("--cells", type=int, default=1500, help="of a species, to train on")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--output", default="cells_controlled")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.steps = [100], min(args.steps, 20)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    tasks = [(name, seed) for seed in args.seeds for name in reversed(args.models)]
    for row in in_turn(functools.partial(run, args=args), tasks, jobs=args.jobs):
        print(json.dumps(finite(row["short"] | {k: row[k] for k in ("model", "seed")})), flush=True)
        rows = sorted([*rows, row], key=lambda row: (list(RUNGS).index(row["model"]), row["seed"]))
        result = {
            "benchmark": "cells_controlled",
            "figures": figures(rows),
            "command": " ".join(["python -m eval.benchmarks.cells_controlled", *sys.argv[1:]]),
            "settings": vars(args)
            | {"sizes": SIZES, "objective": OBJECTIVE}
            | {"rungs": {n: vars(r) for n, r in RUNGS.items()}},
            "table": table_of(rows),
            "rows": rows,
            **describe_machine(),
        }
        if not args.quick:
            RESULTS.mkdir(exist_ok=True)
            text = json.dumps(finite(result), indent=1)
            (RESULTS / f"{args.output}.json").write_text(text + "\n")
    show(rows, print)
    print(json.dumps(finite({k: result[k] for k in ("benchmark", "figures", "machine", "commit")})))


if __name__ == "__main__":
    main()
