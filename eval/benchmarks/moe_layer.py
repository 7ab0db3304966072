"""Forward and backward of one sparse layer: ours, DeepSpeed's `MoE`, and a dense feed-forward.

    python -m eval.benchmarks.moe_layer --quick            # within a minute on 2 cores
    python -m eval.benchmarks.moe_layer                    # the full table (hours on 2 cores)
    python -m eval.benchmarks.moe_layer --tokens 16384 --experts 8 --top_k 1 --skew 4

Same experts, tokens, choices and kind of dropping, measured in turn within one run. Routing is
forced: skew is how many times the mean the fullest expert gets. The dense layer has the active
FLOPs of the sparse one (hidden width times top_k). The last line is one JSON object: ratios are
ours / peer (geometric means over the cases that qualify), memory is the peak of all new tensors.
On a CPU each process uses one thread by default, so that other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import logging
import math
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eval.benchmarks.peak_memory import PeakMemory
from mm_moe.moe.companion import FeedForward
from mm_moe.moe.layer import MoELayer
from mm_moe.moe.settings import MoESettings

RESULTS = Path(__file__).parent / "results"
Step = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One row of the table; `tokens` are those of all processes."""

    processes: int
    tokens: int
    experts: int
    top_k: int
    skew: float
    capacity: bool


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, within a minute")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--top_k", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--skew", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="= ep_size")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of each process")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument(
        "--output", default="moe_layer", help="a full run is stored as results/OUTPUT.json"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.tokens, args.experts, args.top_k, args.skew = [4096], [8], [1], [1.0, 4.0]
        args.width, args.hidden = 128, 512
    return args


def cases(args: argparse.Namespace, processes: int) -> list[Case]:
    """All combinations that can be routed; with a capacity only even loads."""
    grid = itertools.product(args.tokens, args.experts, args.top_k, args.skew)
    rows = [Case(processes, *row, capacity=False) for row in grid if row[3] * row[2] <= row[1]]
    if args.quick and processes > 1:
        return rows
    return rows + [Case(**{**asdict(row), "capacity": True}) for row in rows if row.skew == 1]


def forced_choices(num_tokens: int, case: Case) -> Tensor:
    """Experts (T, K): expert 0 gets `skew` times the mean, the others share the rest evenly."""
    slots = num_tokens * case.top_k
    fullest = round(case.skew * slots / case.experts)
    others = torch.arange(slots - fullest) % (case.experts - 1) + 1
    expert_R = torch.cat([torch.zeros(fullest, dtype=torch.long), others.sort().values])
    return expert_R.view(case.top_k, num_tokens).t()  # a token's choices are far apart: distinct


def forced_tokens(num_tokens: int, case: Case, width: int) -> Tensor:
    """Tokens (T, D) whose first E features are the router's logits."""
    torch.manual_seed(num_tokens)
    x_TD = torch.randn(num_tokens, width) * 0.1
    expert_TK = forced_choices(num_tokens, case)
    strength_K = 8.0 - torch.arange(case.top_k)
    return x_TD.scatter(1, expert_TK, strength_K.expand(num_tokens, -1))


def router_weight(case: Case, width: int) -> Tensor:
    """A router (E, D) that reads its logits from the first E features."""
    return torch.eye(case.experts, width)


def peer(name: str) -> Any:
    """An optional peer's module, or None if it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def ours(case: Case, args: argparse.Namespace) -> nn.Module:
    """Our layer; over several processes with a slice of the experts in each."""
    settings = MoESettings(
        num_experts=case.experts, top_k=case.top_k, drop_tokens=case.capacity, capacity_factor=1.25
    )
    layer = MoELayer(width=args.width, hidden=args.hidden, settings=settings)
    layer.router.weight.data = router_weight(case, args.width)
    if case.processes > 1:
        parallel = importlib.import_module("mm_moe.moe.parallel")
        return parallel.make_expert_parallel(layer, ep_size=case.processes)
    return layer


def deepspeed_layer(case: Case, args: argparse.Namespace) -> nn.Module | None:
    """DeepSpeed's layer with the same experts, or None without DeepSpeed."""
    stock = peer("deepspeed.moe.layer")
    if stock is None:
        return None
    layer = stock.MoE(
        args.width,
        FeedForward(width=args.width, hidden=args.hidden, activation="gelu"),
        num_experts=case.experts,
        ep_size=case.processes,
        k=case.top_k,
        drop_tokens=case.capacity,
        capacity_factor=1.25,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    )
    layer.deepspeed_moe.gate.wg.weight.data = router_weight(case, args.width)
    layer.set_deepspeed_parallelism()
    return layer


def contenders(case: Case, args: argparse.Namespace) -> dict[str, Step]:
    """Name -> one forward and backward, from which gradients come out for inputs and weights."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    num_tokens = case.tokens // case.processes
    x_TD = forced_tokens(num_tokens, case, args.width).to(device, dtype).requires_grad_()
    seed_TD = torch.ones_like(x_TD)
    dense = FeedForward(width=args.width, hidden=args.hidden * case.top_k, activation="gelu")
    modules = {"ours": ours(case, args), "deepspeed": deepspeed_layer(case, args), "dense": dense}

    def step_of(name: str, module: nn.Module) -> Step:
        def step() -> None:
            module.zero_grad(set_to_none=True)
            x_TD.grad = None
            if name == "dense":
                torch.autograd.backward([module(x_TD)], [seed_TD])
                return
            y_TD, second, *_ = module(x_TD)
            loss = sum(second.losses.values()) if name == "ours" else second
            torch.autograd.backward([y_TD, loss], [seed_TD, torch.ones_like(loss)])

        return step

    steps = {
        name: step_of(name, module.to(device, dtype)) for name, module in modules.items() if module
    }
    left, right = x_TD.detach(), torch.randn(args.width, args.hidden, device=device, dtype=dtype)
    product = left @ right  # made beforehand: the rate is that of the arithmetic alone
    return {**steps, "matmul": lambda: torch.mm(left, right, out=product)}


def seconds(step: Step) -> float:
    """Wall time of one step, with the device idle before and after."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(case: Case, args: argparse.Namespace) -> dict:
    """Median times (s) of all contenders in turn, peak bytes, and % of the matmul rate."""
    steps = contenders(case, args)
    peak = {}
    for name, step in steps.items():  # also the warm-up
        step()
        with PeakMemory() as memory:
            step()
        peak[name] = memory.peak
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.repeats):
        for name, step in steps.items():
            times[name].append(seconds(step))
    median = {name: statistics.median(values) for name, values in times.items()}
    # a product of T x D x F costs 2 T D F; the experts six such per choice, forward and backward
    percent = 100 * 6 * case.top_k * median["matmul"] / median["ours"]
    return {**asdict(case), "time_s": median, "peak_bytes": peak, "percent_of_matmul": percent}


def work(args: argparse.Namespace) -> None:
    """What each process does: join the others, measure every case, the first one writes."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    processes = int(os.environ["WORLD_SIZE"])
    if peer("deepspeed") is not None:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        importlib.import_module("deepspeed").init_distributed(dist_backend=backend, verbose=False)
    torch.set_num_threads(args.threads)
    rows = [measure(case, args) for case in cases(args, processes)]
    if os.environ["RANK"] == "0":
        Path(args.worker).write_text(json.dumps(rows))


def launch(processes: int) -> list[dict]:
    """Run this program as workers and read what the first one measured."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
        probe.close()
        out = Path(folder, "rows.json")
        command = [sys.executable, "-m", "eval.benchmarks.moe_layer", *sys.argv[1:], "--worker"]
        workers = [
            subprocess.Popen(
                [*command, str(out)],
                env={
                    **os.environ,
                    **address,
                    "RANK": str(rank),
                    "LOCAL_RANK": str(rank),
                    "WORLD_SIZE": str(processes),
                    **({} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}),
                },
                stdout=subprocess.DEVNULL,
                stderr=None if rank == 0 else subprocess.DEVNULL,
            )
            for rank in range(processes)
        ]
        if any(worker.wait() for worker in workers):
            raise SystemExit(f"the measurement with {processes} processes failed; see above.")
        return json.loads(out.read_text())


def mean_ratio(rows: list[dict], kind: str, other: str) -> float | None:
    """Geometric mean of ours / other over the rows that have both; None without any."""
    ratios = [row[kind]["ours"] / row[kind][other] for row in rows if other in row[kind]]
    if not ratios:
        return None
    return round(math.exp(statistics.fmean(map(math.log, ratios))), 3)


def figures(rows: list[dict]) -> dict[str, float | None]:
    """The ratios of the last line; those to dense and matmul are of one process, most tokens."""
    free = [row for row in rows if not row["capacity"]]
    even = [row for row in free if row["skew"] == 1]
    skewed = [row for row in free if row["skew"] == 4]
    single = [row for row in even if row["processes"] == 1]
    most = max((row["tokens"] for row in single), default=0)
    large = [row for row in single if row["top_k"] == 1 and row["tokens"] == most]
    rates = [row["percent_of_matmul"] for row in single if row["tokens"] == most]
    return {
        "time_vs_deepspeed_balanced": mean_ratio(even, "time_s", "deepspeed"),
        "time_vs_deepspeed_capacity": mean_ratio(
            [row for row in rows if row["capacity"]], "time_s", "deepspeed"
        ),
        "time_vs_deepspeed_skew4": mean_ratio(skewed, "time_s", "deepspeed"),
        "memory_vs_deepspeed_skew4": mean_ratio(skewed, "peak_bytes", "deepspeed"),
        "time_vs_dense_k1": mean_ratio(large, "time_s", "dense"),
        "percent_of_matmul_rate": round(statistics.fmean(rates), 1) if rates else None,
        "time_per_token_most_vs_fewest": scaling(rows, "tokens", per_unit=True),
        "time_most_vs_fewest_experts": scaling(rows, "experts", per_unit=False),
    }


def scaling(rows: list[dict], axis: str, *, per_unit: bool) -> float | None:
    """Our time at the largest value of an axis over that at the smallest, all else equal.

    1 means linear in the axis (`per_unit`) or flat along it. Geometric mean; None without a pair.
    """
    low, high = (pick((row[axis] for row in rows), default=0) for pick in (min, max))

    def key(row: dict) -> tuple:
        return tuple(row[name] for name in Case.__annotations__ if name != axis)

    times = {value: {key(row): row for row in rows if row[axis] == value} for value in (low, high)}
    pairs = [
        math.log(times[high][case]["time_s"]["ours"] / times[low][case]["time_s"]["ours"])
        for case in times[high]
        if case in times[low]
    ]
    if low == high or not pairs:
        return None
    return round(math.exp(statistics.fmean(pairs)) / (high / low if per_unit else 1), 3)


def show(rows: list[dict]) -> None:
    """Print the table: milliseconds (peak MiB)."""
    print(
        "procs  tokens  experts  k  skew  capacity |       ours    deepspeed        dense | matmul"
    )
    for row in rows:
        cells = []
        for name in ("ours", "deepspeed", "dense"):
            value = "-"
            if name in row["time_s"]:
                megabytes = row["peak_bytes"][name] / 2**20
                value = f"{1e3 * row['time_s'][name]:.1f} ({megabytes:.0f})"
            cells.append(f"{value:>12}")
        print(
            f"{row['processes']:>5} {row['tokens']:>7} {row['experts']:>8} {row['top_k']:>2} "
            f"{row['skew']:>5g} {'yes' if row['capacity'] else 'no':>9} |{' '.join(cells)} | "
            f"{row['percent_of_matmul']:.0f}%"
        )


def describe_machine() -> dict[str, str]:
    """Device, library versions and commit."""
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"{os.cpu_count()} cores"
    here = Path(__file__).parent
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True
    )
    return {
        "machine": f"{platform.machine()}, {device}, torch {torch.__version__}",
        "commit": git.stdout.strip() or "unknown",
    }


def main() -> None:
    """Measure with every number of processes, print, and store a full run."""
    args = arguments()
    if args.worker:
        work(args)
        return
    if peer("deepspeed") is None:
        print("deepspeed is not installed: `pip install deepspeed` adds it to the comparison.")
        args.processes = [1]
    rows = [row for processes in args.processes for row in launch(processes)]
    show(rows)
    result = {"benchmark": "moe_layer", "figures": figures(rows), **describe_machine()}
    if not args.quick:
        RESULTS.mkdir(exist_ok=True)
        stored = {**result, "arguments": vars(args), "rows": rows}
        Path(RESULTS, f"{args.output}.json").write_text(json.dumps(stored, indent=1))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
