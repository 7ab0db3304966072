"""Cells per second in training: our loop against scVI's, at equal sizes, from the same cells.

    python -m eval.benchmarks.single_cell --quick                   # within a minute, not stored
    python -m eval.benchmarks.single_cell --data_dir DATA           # stored

Both train a negative-binomial autoencoder with one hidden layer of 128 on either side and 10 latent
dimensions, on the genes that human and mouse bone marrow have in common by name, with the species
as a condition, batch 128, one thread, counts in memory. Ours is the plain objective: an expert for
each species, so twice the matrices, each of which sees half of the cells. Its loop is the stream,
the collator and a step of Adam; theirs is `SCVI.train`. After a first round, rounds of both are
interleaved, and their processor time counts; wall time is stored, too.

The last line is one JSON object: cells per second, ours / theirs, more is better.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from eval.benchmarks.cells_drawn import World
from eval.benchmarks.moe_layer import RESULTS, describe_machine
from eval.cell_tables import CellTable, Tables, joined
from mm_moe.cells.configuration import CellVAEConfig
from mm_moe.cells.modeling import CellVAE
from mm_moe.data.collate import Collator
from mm_moe.data.sets.cells import CellsData
from mm_moe.data.streaming import SampleStream
from pretrain.mmvae import CellObjective

HIDDEN, LATENT, LEARNING_RATE = 128, 10, 1e-3
Round = Callable[[], int]


def cells(data_dir: str | None) -> tuple[dict[str, CellTable], str]:
    """The cells by species, with the genes of both; drawn ones without a folder."""
    if data_dir is None:
        tables = World(0).draw(1000, seed=1).tables
        width = min(len(table.genes) for table in tables.values())
        return {n: t.of_genes(t.genes[:width]) for n, t in tables.items()}, "drawn"
    from eval.benchmarks.cells_integration import data

    _, shared, _ = data(data_dir, genes=10)
    return dict(shared["all"]), "human and mouse bone marrow, shared genes"


def write(tables: Tables, folder: Path) -> None:
    """The cells as files, for our stream."""
    import anndata
    import pandas

    for name, table in tables.items():
        index = pandas.Index([str(number) for number in range(len(table))])
        genes = pandas.DataFrame(index=pandas.Index([gene.upper() for gene in table.genes]))
        found = anndata.AnnData(table.counts, obs=pandas.DataFrame(index=index), var=genes)
        found.write_h5ad(folder / f"{name}.h5ad")


def ours(tables: Tables, folder: Path, *, batch: int, count: int) -> Round:
    """Rounds of our stream, collator, objective and Adam."""
    files = {name: f"{name}.h5ad" for name in tables}
    source = CellsData(str(folder), files=files, shares=(1, 0, 0), sampler="proportional")
    torch.manual_seed(0)
    model = CellVAE(
        CellVAEConfig(
            modalities=list(tables),
            genes={name: list(genes) for name, genes in source.vocabulary.genes.items()},
            expert_hidden=[HIDDEN],
            expert_width=HIDDEN,
            core_hidden=[HIDDEN],
            latent_size=LATENT,
            likelihood="nb",
        )
    ).train()
    aim = CellObjective()
    aim.prepare(model, device=torch.device("cpu"), seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    collate = Collator(
        modalities=source.modalities,
        processors=model.processors(),
        problem_type="none",
        num_labels=0,
    )
    stream = SampleStream(source, split="train", batch_size=batch, shuffle_buffer=10_000)
    line = iter(DataLoader(stream, batch, collate_fn=collate))

    def one() -> int:
        seen = 0
        for found in itertools.islice(line, -(-count // batch)):
            aim(model, found)[0].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 100.0)
            optimizer.step()
            optimizer.zero_grad()
            aim.annealer.step()
            seen += len(found.ids)
        return seen

    return one


def theirs(tables: Tables, *, batch: int, epochs: int) -> Round:
    """Rounds of `SCVI.train`."""
    import anndata
    import pandas
    import scvi

    scvi.settings.seed = 0
    scvi.settings.verbosity = logging.ERROR
    for name in ("lightning.pytorch", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    both = list(tables.values())
    whole = joined([t if n == 0 else _renamed(t, both[0]) for n, t in enumerate(both)])
    species = np.concatenate([np.full(len(t), name) for name, t in tables.items()])
    index = pandas.Index([str(number) for number in range(len(whole))])
    table = anndata.AnnData(whole.counts, obs=pandas.DataFrame({"species": species}, index=index))
    scvi.model.SCVI.setup_anndata(table, batch_key="species")
    model = scvi.model.SCVI(table, n_hidden=HIDDEN, n_latent=LATENT, gene_likelihood="nb")

    def one() -> int:
        model.train(
            max_epochs=epochs,
            accelerator="cpu",
            batch_size=batch,
            train_size=1.0,
            enable_progress_bar=False,
            logger=False,
            enable_checkpointing=False,
        )
        return epochs * len(whole)

    return one


def _renamed(table: CellTable, like: CellTable) -> CellTable:
    """The same counts under the other's names: genes are paired by place."""
    return CellTable(table.counts, like.genes, table.ids, table.conditions, table.types)


def measure(rounds: dict[str, Round], *, count: int) -> list[dict[str, Any]]:
    """Cells, processor and wall seconds of every round but the first."""
    rows = []
    for number in range(count + 1):
        names = list(rounds) if number % 2 else list(rounds)[::-1]
        for name in names:
            cpu, wall = time.process_time(), time.perf_counter()
            seen = rounds[name]()
            row = {"loop": name, "round": number, "cells": seen}
            row |= {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}
            if number:
                rows.append(row)
    return rows


def figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Median over rounds of ours / theirs in cells per second of processor time."""
    rate = {(row["loop"], row["round"]): row["cells"] / row["cpu_s"] for row in rows}
    ratios = [rate["ours", n] / rate["scVI", n] for loop, n in rate if loop == "ours"]
    return {
        "cells_per_second_vs_scvi": statistics.median(ratios),
        "cells_per_second": statistics.median(v for (loop, _), v in rate.items() if loop == "ours"),
    }


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds; not stored")
    parser.add_argument("--data_dir", help="folder of the two files; default: drawn cells")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=1, help="of theirs in a round")
    parser.add_argument("--output", default="single_cell", help="name of the stored result")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    try:
        import scvi
    except ImportError:
        print("nothing to compare with: pip install scvi-tools")
        return
    tables, whence = cells(args.data_dir)
    count = args.epochs * sum(len(table) for table in tables.values())
    with tempfile.TemporaryDirectory() as name:
        write(tables, Path(name))
        loops = {
            "ours": ours(tables, Path(name), batch=args.batch, count=count),
            "scVI": theirs(tables, batch=args.batch, epochs=args.epochs),
        }
        rows = measure(loops, count=2 if args.quick else args.rounds)
    command = " ".join("DATA" if arg == args.data_dir else arg for arg in sys.argv[1:])
    result = {
        "benchmark": "single_cell",
        "figures": figures(rows),
        "command": f"python -m eval.benchmarks.single_cell {command}",
        "settings": {k: v for k, v in vars(args).items() if k != "data_dir"}
        | {"cells": whence, "genes": len(next(iter(tables.values())).genes)}
        | {"hidden": HIDDEN, "latent": LATENT, "scvi": scvi.__version__},
        "rows": rows,
        **describe_machine(),
    }
    if not args.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{args.output}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: result[k] for k in ("benchmark", "figures", "machine", "commit")}))


if __name__ == "__main__":
    main()
