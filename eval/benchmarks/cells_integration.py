"""Human and mouse bone marrow in one latent space: the ablation, and peers that need orthologues.

    python -m eval.benchmarks.cells_integration --data_dir DATA           # three seeds, stored
    python -m eval.benchmarks.cells_integration --data_dir DATA --peers   # and the peers
    python -m eval.benchmarks.cells_integration --data_dir DATA --tune    # validation, seed 100

`DATA` holds `human_bone_marrow.h5ad` and `mouse_bone_marrow.h5ad`. Ours takes the most variable
genes of each species, chosen on its training cells without a look at the other species; the peers
(scVI, scANVI, PCA, Harmony) take the genes whose names are the same up to case. Cells are dealt
8 : 1 : 1 by a hash of their names; all scores are of test cells, all settings were chosen on
validation cells with another seed. Harmony and PCA have no map for new cells and see test cells.

Types are lineages: of the mouse, its published clusters; of human cells, by genes that mark a
lineage (`eval.cell_types`). The last line is one JSON object; rows are stored as they are done.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from typing import Any

import numpy as np
import torch

from eval.benchmarks.cells_training import RUNGS, in_turn, show, table_of, train
from eval.benchmarks.moe_layer import RESULTS, describe_machine
from eval.cell_tables import Tables, variable_genes
from eval.integration import finite, headline, scores, split_tables
from mm_moe.data.sets.cells import CellsData
from pretrain.cell_anchors import SAME_NAME, anchor_places

FILES = {"human": "human_bone_marrow.h5ad", "mouse": "mouse_bone_marrow.h5ad"}
SIZES = {
    "expert_hidden": [128],
    "expert_width": 64,
    "core_hidden": [64],
    "latent_size": 10,
    "likelihood": "nb",
}
TUNING_SEED = 100
CHOSEN = "adversary, 50 anchors"  # on validation cells
OBJECTIVE = {"kl_low": 0.0, "kl_climb": 100, "balance": "genes", "adversary_ramp": 100}


def data(folder: str, *, genes: int) -> tuple[dict[str, Tables], dict[str, Tables], dict[str, str]]:
    """Split -> cells with the variable genes, the same with shared genes, and whence the types."""
    source = CellsData(folder, files=FILES)
    tables, told = split_tables(source, types="cell_type")
    chosen = {name: variable_genes(table, genes) for name, table in tables["train"].items()}
    named = {
        name: {gene.upper(): gene for gene in table.genes}
        for name, table in tables["train"].items()
    }
    both = sorted(set.intersection(*(set(own) for own in named.values())))
    variable: dict[str, Tables] = {}
    shared: dict[str, Tables] = {}
    for split, own in tables.items():
        variable[split] = {name: table.of_genes(chosen[name]) for name, table in own.items()}
        shared[split] = {
            name: table.of_genes(tuple(named[name][gene] for gene in both))
            for name, table in own.items()
        }
    return variable, shared, told


def ours(task: tuple[str, int], *, tables: dict[str, Tables], args: Any) -> dict[str, Any]:
    """Train a rung with one seed and score it."""
    name, seed = task
    model, seconds = train(
        tables["train"],
        RUNGS[name],
        seed=seed,
        steps=args.steps,
        batch=args.batch,
        learning_rate=args.learning_rate,
        options=SIZES,
        objective=OBJECTIVE,
        anchors=same_names(tables["train"], RUNGS[name].anchors, seed=seed),
    )
    found, _ = scores(model, tables["validation" if args.tune else "test"], critics=False)
    return {"model": name, "seed": seed, "cpu_s": seconds, "short": headline(found), **found}


def same_names(tables: Tables, count: int, *, seed: int) -> dict[str, list[str]] | None:
    """So many genes, drawn from those whose names are the same up to case; None for 0."""
    if not count:
        return None
    genes = {name: table.genes for name, table in tables.items()}
    both = anchor_places(SAME_NAME, genes)
    total = len(next(iter(both.values())))
    drawn = np.random.default_rng(seed).choice(total, min(count, total), replace=False)
    return {name: [genes[name][places[n]] for n in sorted(drawn)] for name, places in both.items()}


def figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What the chosen rung gains over the plain model, and what it loses of the reconstruction."""
    table = table_of(rows)
    if "plain" not in table or CHOSEN not in table:
        return {}
    found = {}
    for name, score in (
        ("species_mixing", "species_mixing"),
        ("label_transfer", "transfer"),
        ("centred_r", "centred_r"),
    ):
        found[f"{name}_plain"] = table["plain"][score]["mean"]
        found[f"{name}_chosen"] = table[CHOSEN][score]["mean"]
    loss = {name: table[name]["loss"]["mean"] for name in ("plain", CHOSEN)}
    return {**found, "reconstruction_loss_ratio": loss[CHOSEN] / loss["plain"]}


def store(rows: list[dict[str, Any]], args: Any, facts: dict[str, Any]) -> dict[str, Any]:
    """Write what there is so far."""
    command = " ".join("DATA" if arg == args.data_dir else arg for arg in sys.argv[1:])
    result = {
        "benchmark": "cells_integration",
        "figures": figures(rows),
        "command": f"python -m eval.benchmarks.cells_integration {command}",
        "settings": {k: v for k, v in vars(args).items() if k != "data_dir"}
        | {"sizes": SIZES, "objective": OBJECTIVE, "rungs": {n: vars(r) for n, r in RUNGS.items()}}
        | facts,
        "table": table_of(rows),
        "rows": rows,
        **describe_machine(),
    }
    if not args.tune:
        RESULTS.mkdir(exist_ok=True)
        text = json.dumps(finite(result), indent=1)
        (RESULTS / f"{args.output}.json").write_text(text + "\n")
    return result


def told_and_stored(
    row: dict[str, Any], rows: list[dict[str, Any]], args: Any, facts: dict[str, Any]
) -> dict[str, Any]:
    """A line for a row that is done, and the file with all so far."""
    short = row["short"] | {key: row[key] for key in ("model", "seed", "cpu_s")}
    print(json.dumps(finite(short)), flush=True)
    return store(rows, args, facts)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", required=True, help="folder with the two files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", choices=list(RUNGS), default=list(RUNGS))
    parser.add_argument("--peers", action="store_true", help="scVI, scANVI, PCA and Harmony, too")
    parser.add_argument("--only_peers", action="store_true", help="no model of ours")
    parser.add_argument("--genes", type=int, default=2000, help="variable genes of each species")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--jobs", type=int, default=1, help="models of ours at a time")
    parser.add_argument("--tune", action="store_true", help="validation cells, one seed; no file")
    parser.add_argument("--output", default="cells_integration")
    args = parser.parse_args()
    if args.tune:
        args.seeds = [TUNING_SEED]
    if args.only_peers:
        args.models, args.peers = [], True
    return args


def main() -> None:
    """Train, score, print and store."""
    args = arguments()
    torch.set_num_threads(1)
    variable, shared, told = data(args.data_dir, genes=args.genes)
    facts: dict[str, Any] = {
        "cells": {split: {n: len(t) for n, t in own.items()} for split, own in variable.items()},
        "shared_genes": len(next(iter(shared["train"].values())).genes),
        "types": told,
    }
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    tasks = [(name, seed) for seed in args.seeds for name in reversed(args.models)]
    work = functools.partial(ours, tables=variable, args=args)
    for row in in_turn(work, tasks, jobs=args.jobs):
        rows = sorted([*rows, row], key=lambda row: (list(RUNGS).index(row["model"]), row["seed"]))
        result = told_and_stored(row, rows, args, facts)
    if args.peers:
        from eval.benchmarks.cells_peers import peers

        for seed in args.seeds:
            for row in peers(shared, seed=seed, args=args):
                rows.append(row)
                result = told_and_stored(row, rows, args, facts)
    show(rows, print)
    print(json.dumps(finite({k: result[k] for k in ("benchmark", "figures", "machine", "commit")})))


if __name__ == "__main__":
    main()
