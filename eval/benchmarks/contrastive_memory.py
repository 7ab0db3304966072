"""Memory of contrastive losses by global batch: ours in every variant, and open_clip's.

    python -m eval.benchmarks.contrastive_memory --quick    # within a minute on 2 cores
    python -m eval.benchmarks.contrastive_memory            # 1 and 2 processes, stored

Measured is the peak, on the first process, of the bytes of live tensors that operators make in one
forward and backward pass of a loss from features; the features themselves, and scratch memory
inside an operator and inside collectives, are not in it. Both open_clip losses are what its
training takes for exact gradients without surplus logits: `ClipLoss(local_loss=True,
gather_with_grad=True)` and `SigLipLoss()` with its neighbour exchange. The peer's numbers are the
same as ours (tested), so memory is all that differs.

The bytes are a polynomial in the batch, of second degree with whole logits and of first with tiles.
It is fitted to four batches; larger ones are computed from it and marked so, as 65,536 samples on
one process would take open_clip's loss 69 GB. The largest error of the fit stands in its row.
Figures are ours / open_clip's; the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from eval.benchmarks.moe_layer import RESULTS, describe_machine
from eval.benchmarks.peak_memory import PeakMemory
from pretrain.contrastive import LOSSES, VARIANTS, contrastive_loss

PEER = "open_clip"
WANTED = (4096, 16384, 65536)
MIB = 1 << 20
Measured = dict[str, dict[str, int]]  # "loss way" -> global batch -> bytes


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one process alone")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batches", type=int, nargs="+", default=[1024, 2048, 3072, 4096])
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.processes = [1]
    return args


def peer_loss(loss: str, rank: int, world_size: int) -> Callable[..., Tensor] | None:
    """open_clip's loss, or None where it is not installed."""
    try:
        from open_clip.loss import ClipLoss, SigLipLoss
    except ImportError:
        return None
    if loss == "sigmoid":
        return SigLipLoss(rank=rank, world_size=world_size)
    return ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world_size)


def ways(loss: str, *, rank: int, world_size: int, chunk: int) -> dict[str, Callable[..., Tensor]]:
    """Name -> loss of (image features, text features, scale, bias)."""

    def ours(variant: str) -> Callable[..., Tensor]:
        def compute(image_BD: Tensor, text_BD: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
            complete_B = torch.ones(len(image_BD), dtype=torch.bool)
            return contrastive_loss(
                image_BD,
                text_BD,
                complete_B,
                scale,
                logit_bias=bias,
                loss=loss,
                variant=variant,
                chunk=chunk,
            )

        return compute

    found = {variant: ours(variant) for variant in VARIANTS}
    peer = peer_loss(loss, rank, world_size)
    if peer is not None:

        def compute(image_BD: Tensor, text_BD: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
            features = (F.normalize(part, dim=-1) for part in (image_BD, text_BD))
            given = (bias,) if loss == "sigmoid" else ()
            return peer(*features, scale.exp(), *given).sum()

        found[PEER] = compute
    return found


def peak(compute: Callable[..., Tensor], rows: int, width: int) -> int:
    """Bytes of one forward and backward pass."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(rows, width, generator=generator) for _ in range(2)]
    leaves += [torch.tensor([2.0]), torch.tensor([-10.0])]
    for leaf in leaves:
        leaf.requires_grad_()
    with PeakMemory() as memory:
        compute(*leaves).backward()
    return memory.peak


def work(args: argparse.Namespace) -> Measured:
    """What this process needs, for every loss, way and batch."""
    world_size, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    found: Measured = {}
    for loss in LOSSES:
        for name, compute in ways(loss, rank=rank, world_size=world_size, chunk=args.chunk).items():
            row = found.setdefault(f"{loss} {name}", {})
            for batch in args.batches:
                row[str(batch)] = peak(compute, batch // world_size, args.width)
    return found


def start_worker(args: argparse.Namespace) -> None:
    """Join the others and write what this process found."""
    from mm_moe.training import runtime

    torch.set_num_threads(1)
    if int(os.environ["WORLD_SIZE"]) > 1:
        runtime.start()
    found = work(args)
    if runtime.is_main():
        Path(args.worker).write_text(json.dumps(found))
    runtime.stop()


def measure(args: argparse.Namespace, world_size: int) -> Measured:
    """Run this program as workers and read what the first one measured."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder, "found.json")
        command = [sys.executable, "-m", "eval.benchmarks.contrastive_memory", *sys.argv[1:]]
        shared = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        workers = [
            subprocess.Popen(
                [*command, "--worker", str(found)],
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL,
            )
            for rank in range(world_size)
        ]
        if any([worker.wait() for worker in workers]):
            raise SystemExit(f"a worker of {world_size} failed; its message is above.")
        return json.loads(found.read_text())


def polynomial(row: dict[str, int], *, degree: int) -> np.polynomial.Polynomial:
    """Bytes by batch, fitted to what was measured."""
    batches = np.array([float(batch) for batch in row])
    return np.polynomial.Polynomial.fit(batches, np.array(list(row.values())), degree)


def rows_of(found: Measured, world_size: int) -> list[dict[str, Any]]:
    """One row per loss and way: bytes at the wanted batches, and how well the formula holds."""
    rows = []
    for name, row in found.items():
        loss, way = name.split()
        formula = polynomial(row, degree=1 if way in ("chunked", "ring") else 2)
        size = {str(batch): row.get(str(batch), round(formula(batch))) for batch in WANTED}
        errors = [abs(formula(int(batch)) / value - 1) for batch, value in row.items()]
        rows.append(
            {
                "processes": world_size,
                "loss": loss,
                "way": way,
                "bytes": size,
                "computed": [batch for batch in WANTED if str(batch) not in row],
                "largest_error_of_fit": round(max(errors), 4),
                "measured": row,
            }
        )
    return rows


def figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Ours / open_clip's: "LOSS_VARIANT_BATCH_over_PROCESSES"."""
    peers = {(row["processes"], row["loss"]): row["bytes"] for row in rows if row["way"] == PEER}
    found = {}
    for row in rows:
        peer = peers.get((row["processes"], row["loss"]))
        if peer is None or row["way"] == PEER:
            continue
        for batch, size in row["bytes"].items():
            key = f"{row['loss']}_{row['way']}_{batch}_over_{row['processes']}"
            found[key] = round(size / peer[batch], 4)
    return found


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table in MiB; computed numbers have a star."""
    print(f"processes  loss     way       {''.join(f'{batch:>12}' for batch in WANTED)}   MiB")
    for row in rows:
        cells = [
            f"{size / MIB:,.0f}{'*' if int(batch) in row['computed'] else ' '}"
            for batch, size in row["bytes"].items()
        ]
        print(
            f"{row['processes']:>9}  {row['loss']:<8} {row['way']:<10}"
            + "".join(f"{cell:>12}" for cell in cells)
        )
    worst = max(row["largest_error_of_fit"] for row in rows)
    print(f"* computed; the formula is off by at most {worst:.1%} where it was fitted")


def main() -> None:
    """Measure with every number of processes, print, and store a full run."""
    args = arguments()
    if args.worker:
        start_worker(args)
        return
    if peer_loss("softmax", 0, 1) is None:
        print("open_clip is not installed (pip install open-clip-torch): ours alone")
    rows = [
        row
        for world_size in args.processes
        for row in rows_of(measure(args, world_size), world_size)
    ]
    show(rows)
    result = {"benchmark": "contrastive_memory", "figures": figures(rows), **describe_machine()}
    if not args.quick:
        RESULTS.mkdir(exist_ok=True)
        options = {key: value for key, value in vars(args).items() if key != "worker"}
        stored = {**result, "arguments": options, "rows": rows}
        Path(RESULTS, "contrastive_memory.json").write_text(json.dumps(stored, indent=1))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
