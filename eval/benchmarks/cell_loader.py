"""Cells per second and core: our loader against anndata's own, from the same `.h5ad` file.

    python -m eval.benchmarks.cell_loader --quick --data_dir DATA   # within a minute
    python -m eval.benchmarks.cell_loader --data_dir DATA           # stored

`DATA` holds `single_cell/human_bone_marrow.h5ad`; without it counts of the same density are drawn.
Each pipeline shuffles, batches, and ends with a float32 matrix of the batch on the CPU, in one
process with one thread: with the file in memory (our option `memory_mib`; anndata's usual way), and
read from disk (`memory_mib` 0; `backed="r"`). Ours gives the sum of every cell, its id and the
codes of its conditions besides, and resumes exactly; and it can leave the matrix to the model's
device ("sparse"). After a first round, rounds of all pipelines are interleaved, and their CPU time
counts; wall time is stored, too.

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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from eval.benchmarks.moe_layer import RESULTS, describe_machine
from mm_moe.data.cells.rows import CellProcessor
from mm_moe.data.collate import Collator
from mm_moe.data.sets.cells import CellsData
from mm_moe.data.streaming import SampleStream

FILE = "single_cell/human_bone_marrow.h5ad"
BUFFER = 10_000  # rows that our stream may hold; the default of a run
MEMORY, DISK, SPARSE = "ours, memory", "ours, disk", "ours, memory, sparse"
THEIR_MEMORY, THEIR_DISK = "AnnLoader, memory", "AnnLoader, disk"
Batches = Iterator[int]


def drawn_file(folder: Path, *, cells: int = 4000, genes: int = 16_000) -> Path:
    """Counts with about 2,200 genes a cell, as in the real file."""
    import anndata
    import scipy.sparse

    matrix = scipy.sparse.random(
        cells, genes, density=0.136, format="csr", dtype=np.float32, rng=np.random.default_rng(0)
    )
    matrix.data = np.ceil(matrix.data * 5)
    path = folder / "human.h5ad"
    anndata.AnnData(matrix).write_h5ad(path, compression="gzip")
    return path


def ours(path: Path, *, batch: int, memory_mib: float, form: str) -> Batches:
    """Our stream and collator, as a run has them; gives the cells of each batch."""
    source = CellsData(
        str(path.parent),
        files={"human": path.name},
        conditions=["species"],
        shares=(1, 0, 0),
        memory_mib=memory_mib,
    )
    genes = len(source.vocabulary.genes["human"])
    collate = Collator(
        modalities=source.modalities,
        processors={"human": CellProcessor(genes, form=form)},
        problem_type="none",
        num_labels=0,
    )
    stream = SampleStream(source, split="train", batch_size=batch, shuffle_buffer=BUFFER)
    for found in DataLoader(stream, batch, collate_fn=collate):
        if form == "dense":
            assert found.inputs["human"]["values"].dtype == torch.float32
        yield len(found.ids)


def theirs(path: Path, *, batch: int, backed: bool) -> Batches:
    """Anndata's loader; its matrix has the file's own type and is made float32."""
    import anndata
    from anndata.experimental import AnnLoader

    table = anndata.read_h5ad(path, backed="r" if backed else None)
    loader = AnnLoader(table, batch_size=batch, shuffle=True)
    for found in itertools.chain.from_iterable(itertools.repeat(loader)):
        yield len(found.X.float())


def pipelines(path: Path, *, batch: int) -> dict[str, Batches]:
    """All of them."""
    makers: dict[str, Callable[[], Batches]] = {
        MEMORY: lambda: ours(path, batch=batch, memory_mib=1024, form="dense"),
        SPARSE: lambda: ours(path, batch=batch, memory_mib=1024, form="sparse"),
        DISK: lambda: ours(path, batch=batch, memory_mib=0, form="dense"),
        THEIR_MEMORY: lambda: theirs(path, batch=batch, backed=False),
        THEIR_DISK: lambda: theirs(path, batch=batch, backed=True),
    }
    return {name: make() for name, make in makers.items()}


def measure(found: dict[str, Batches], *, rounds: int, batches: int) -> dict[str, Any]:
    """CPU and wall seconds per thousand cells of each round, without the first."""
    seconds: dict[str, Any] = {name: {"cpu_s": [], "wall_s": []} for name in found}
    names = list(found)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            cpu, wall = time.process_time(), time.perf_counter()
            cells = sum(itertools.islice(found[name], batches)) / 1000
            if number:
                seconds[name]["cpu_s"].append((time.process_time() - cpu) / cells)
                seconds[name]["wall_s"].append((time.perf_counter() - wall) / cells)
    return seconds


def figures(seconds: dict[str, Any]) -> dict[str, float]:
    """Median over rounds of theirs / ours, in seconds for as many cells."""
    pairs = {
        "cells_per_second_vs_annloader_memory": (MEMORY, THEIR_MEMORY),
        "cells_per_second_vs_annloader_disk": (DISK, THEIR_DISK),
        "sparse_cells_per_second_vs_annloader_memory": (SPARSE, THEIR_MEMORY),
    }
    return {
        name: statistics.median(
            theirs / ours
            for ours, theirs in zip(seconds[mine]["cpu_s"], seconds[other]["cpu_s"], strict=True)
        )
        for name, (mine, other) in pairs.items()
    }


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds; not stored")
    parser.add_argument("--data_dir", help=f"folder with {FILE}; default: drawn counts")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--batches", type=int, default=33, help="of a round: an epoch")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", default="cell_loader", help="name of the stored result")
    args = parser.parse_args()
    if args.quick:
        args.rounds = 3
    torch.set_num_threads(1)
    logging.getLogger().setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    try:
        import anndata
    except ImportError:
        print("nothing to compare with: pip install -e '.[single_cell]'")
        return
    with tempfile.TemporaryDirectory() as name:
        path = Path(args.data_dir) / FILE if args.data_dir else drawn_file(Path(name))
        seconds = measure(
            pipelines(path, batch=args.batch), rounds=args.rounds, batches=args.batches
        )
    for pipeline, found in seconds.items():
        rate = 1000 / statistics.median(found["cpu_s"])
        print(f"{pipeline:22} {rate:9,.0f} cells/s of one core")
    result = {
        "benchmark": "cell_loader",
        "figures": figures(seconds),
        "command": "python -m eval.benchmarks.cell_loader "
        + " ".join("DATA" if arg == args.data_dir else arg for arg in sys.argv[1:]),
        "settings": {k: v for k, v in vars(args).items() if k != "data_dir"}
        | {"anndata": anndata.__version__, "file": FILE if args.data_dir else "drawn"},
        "rows": [{"pipeline": name, **found} for name, found in seconds.items()],
        **describe_machine(),
    }
    if not args.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{args.output}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: result[k] for k in ("benchmark", "figures", "machine", "commit")}))


if __name__ == "__main__":
    main()
