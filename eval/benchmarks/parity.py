"""Training through DeepSpeed's engine against a plain one-process loop, for every combination.

    python -m eval.benchmarks.parity --quick      # every pair of values once, about half a minute
    python -m eval.benchmarks.parity              # the full product, about ten minutes on 2 cores

Processes {1, 2, 4} x ep_size {1, 2, 4} x ZeRO {0, 1, 2} x gradient accumulation {1, 2} x
top_k {1, 2, 4} x {fp32, bf16}, twenty AdamW steps each, with ranks and whole micro-batches that
have no token, experts without tokens, and a clip that acts in every step. bf16 at ZeRO-0 is left
out: the trainer refuses it. Prints the differences of each cell and, as its last line, one JSON
object with the worst ones.

Every difference is taken on every rank and the largest one counts:
    loss      absolute, over all steps
    gradient  |ours - theirs| / |theirs| over all parameters, of the first step of each kind
    tensor    the same for each tensor and for each expert of a tensor by itself
    norm      relative, of the norm before the clip, over all steps
    weights   absolute, after the last step
    rows      share of routed rows that went to another expert
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing import spawn

from eval.benchmarks.moe_layer import RESULTS, describe_machine
from eval.benchmarks.parity_loops import CLIP, Cell, Trace, engine_loop, plain_loop
from mm_moe.training import runtime

PROCESSES = (1, 2, 4)
QUANTITIES = ("loss", "gradient", "tensor", "norm", "weights", "rows")
FP32, BF16 = "fp32", "bf16"
# what is compared: a cell's precision -> its references
REFERENCES = {FP32: ("plain",), BF16: ("plain", "one_process")}
TINY = 1e-30  # of a gradient that is exactly zero


def all_cells() -> list[Cell]:
    """The full product, less what cannot be and bf16 at ZeRO-0."""
    grid = itertools.product(PROCESSES, (1, 2, 4), (0, 1, 2), (1, 2), (1, 2, 4), (FP32, BF16))
    cells = [Cell(*values) for values in grid]
    return [
        cell
        for cell in cells
        if cell.processes % cell.ep_size == 0 and (cell.precision == FP32 or cell.stage)
    ]


def pairs(cell: Cell) -> set[tuple]:
    """Every two settings of a cell, with their names."""
    return set(itertools.combinations(asdict(cell).items(), 2))


def covering_cells() -> list[Cell]:
    """Few cells that hold every pair of values of the full product; greedy, always the same."""
    cells = sorted(all_cells(), key=lambda cell: cell.processes * cell.accumulation)
    missing, chosen = set().union(*map(pairs, cells)), []
    while missing:
        best = max(cells, key=lambda cell: len(pairs(cell) & missing))  # the first is the cheapest
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def _relative(theirs: Tensor, ours: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm().clamp(min=TINY)).item()


def _gradient(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> dict[str, float]:
    names = list(theirs)
    whole = [torch.cat([side[name].flatten() for name in names]) for side in (theirs, ours)]
    worst = 0.0
    for name in names:
        sides = [side[name] if ".experts." in name else side[name][None] for side in (theirs, ours)]
        worst = max([worst, *(_relative(*rows) for rows in zip(*sides, strict=True))])
    return {"gradient": _relative(*whole), "tensor": worst}


def compare(theirs: Trace, ours: Trace) -> dict[str, float]:
    """The differences of two traces by quantity."""
    gradients = [_gradient(*sides) for sides in zip(theirs.gradients, ours.gradients, strict=True)]
    losses = zip(theirs.losses, ours.losses, strict=True)
    norms = zip(theirs.norms, ours.norms, strict=True)
    weights = (ours.weights[name] - value for name, value in theirs.weights.items())
    routed = torch.stack(theirs.routed)
    moved = (torch.stack(ours.routed) - routed).abs().sum() / 2
    return {
        "loss": max(abs(a - b) for a, b in losses),
        **{key: max(entry[key] for entry in gradients) for key in gradients[0]},
        "norm": max(abs(a - b) / a for a, b in norms),
        "weights": max(gap.abs().max().item() for gap in weights),
        "rows": (moved / routed.sum()).item(),
    }


def facts(trace: Trace) -> dict[str, Any]:
    """Whether what is hard happened, so that a comparison means something."""
    tokens = [rank for micro_batch in trace.tokens for rank in micro_batch]
    return {
        "uneven": any(len(set(ranks)) > 1 for ranks in trace.tokens),
        "rank_without_token": any(0 in ranks and any(ranks) for ranks in trace.tokens),
        "batch_without_token": any(not any(ranks) for ranks in trace.tokens),
        "expert_without_token": any(
            bool((rows == 0).any() and rows.any())
            for micro_batch in trace.routed
            for rows in micro_batch
        ),
        "clipped": sum(norm > CLIP for norm in trace.norms) / len(trace.norms),
        "tokens": sum(tokens),
    }


def measure(
    rank: int, world_size: int, cells: Sequence[Cell], folder: str
) -> dict[Cell, dict[str, Any]]:
    """What every rank does: run the cells of this number of processes and compare. A collective.

    Args:
        rank: this process.
        world_size: all processes; the process group is up.
        cells: of any number of processes; those of others are passed over.
        folder: where one process leaves its bf16 traces, so it has to come first.

    Returns:
        By cell, its facts and by reference the largest difference over the ranks.
    """
    plain: dict[tuple[int, int], Trace] = {}
    if world_size == 1:
        for cell in {_alone(cell) for cell in cells if cell.precision == BF16}:
            torch.save(asdict(engine_loop(cell)), Path(folder, _file(cell)))
    found = {}
    for cell in cells:
        if cell.processes != world_size:
            continue
        key = (cell.accumulation, cell.top_k)
        if key not in plain:
            plain[key] = plain_loop(accumulation=cell.accumulation, top_k=cell.top_k)
        ours = engine_loop(cell)
        result: dict[str, Any] = {"facts": facts(ours)}
        for reference in REFERENCES[cell.precision]:
            theirs = plain[key]
            if reference == "one_process":
                theirs = Trace(**torch.load(Path(folder, _file(cell)), weights_only=True))
            every = runtime.gather_objects(compare(theirs, ours))
            result[reference] = {name: max(gaps[name] for gaps in every) for name in QUANTITIES}
        found[cell] = result
    return found


def _alone(cell: Cell) -> Cell:
    return Cell(1, 1, cell.stage, cell.accumulation, cell.top_k, cell.precision)


def _file(cell: Cell) -> str:
    return f"{cell.stage}-{cell.accumulation}-{cell.top_k}.pt"


def _work(rank: int, world_size: int, port: int, cells: Sequence[Cell], folder: str) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    runtime.start()
    found = measure(rank, world_size, cells, folder)
    if rank == 0:
        rows = [{**asdict(cell), **result} for cell, result in found.items()]
        Path(folder, f"rows-{world_size}.json").write_text(json.dumps(rows))
    runtime.stop()


def run(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Measure the cells, one process first; one row per cell."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for world_size in PROCESSES:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            spawn(_work, args=(world_size, port, cells, folder), nprocs=world_size)
            rows += json.loads(Path(folder, f"rows-{world_size}.json").read_text())
    return rows


def worst(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The largest difference of each kind, named "PRECISION_vs_REFERENCE_QUANTITY"."""
    return {
        f"{precision}_vs_{reference}_{quantity}": max(
            row[reference][quantity] for row in rows if row["precision"] == precision
        )
        for precision, references in REFERENCES.items()
        for reference in references
        for quantity in QUANTITIES
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per cell and reference."""
    head = "procs  ep  ZeRO  accum  k  precision  against     | "
    lines = [head + " ".join(f"{quantity:>8}" for quantity in QUANTITIES)]
    for row in rows:
        for reference in REFERENCES[row["precision"]]:
            settings = (
                f"{row['processes']:>5} {row['ep_size']:>3} {row['stage']:>5} "
                f"{row['accumulation']:>6} {row['top_k']:>2}  {row['precision']:<9}  "
                f"{reference:<11} | "
            )
            lines.append(settings + " ".join(f"{row[reference][q]:8.1e}" for q in QUANTITIES))
    return "\n".join(lines)


def main() -> None:
    """Run, print, store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="every pair of values; not stored")
    options = parser.parse_args()
    rows = run(covering_cells() if options.quick else all_cells())
    print(table(rows))
    result = {"benchmark": "parity", "figures": worst(rows), **describe_machine()}
    if not options.quick:
        RESULTS.mkdir(exist_ok=True)
        stored = {**result, "command": "python -m eval.benchmarks.parity", "rows": rows}
        (RESULTS / "parity.json").write_text(json.dumps(stored, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
