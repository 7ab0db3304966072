"""`launch/plan.py`'s bytes per process against those that real training steps allocate.

    python -m eval.benchmarks.memory_estimate            # all cases, about ten minutes on 2 cores
    python -m eval.benchmarks.memory_estimate --quick    # two small ones, within a minute

Each case runs the training program on CPU processes for a few steps and then the planner with the
same flags. Measured are the bytes of all live tensors that came out of operators, at their highest
from the making of the engine to the last step, on the process that needs most; scratch memory
inside an operator and inside collectives is not seen. The peak size of the process, less what it
was after its imports, stands beside as a check (it has fragments and libraries in it). The planner
gets the lengths of the texts that came, as only the data know them. Figures are estimate over
measured.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from eval.benchmarks.moe_layer import RESULTS, describe_machine
from eval.benchmarks.peak_memory import PeakMemory

ROOT = Path(__file__).parents[2]
TRAIN, PLAN = ROOT / "launch" / "train.py", ROOT / "launch" / "plan.py"
STEPS = 2  # optimizer state exists from the end of the first one
SMALL = {"num_blocks": 2}
NARROW = {"width": 256, "num_blocks": 6, "num_heads": 4, "hidden": 1024, "patch_size": 8}
MIDDLE = {"width": 512, "num_blocks": 8, "num_heads": 8, "hidden": 2048}


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        name: shown in the table.
        stage: a file in `ds_configs`, without its ending.
        processes: how many.
        ep_size: over which the experts are spread.
        shape: fields of the small CLIP; None is the default recipe as it is.
        num_experts: E.
        top_k: K.
        bf16: precision of weights and gradients.
        bucket: elements of a gradient bucket instead of the file's, which would hide a small model.
        more: further flags.
    """

    name: str
    stage: str
    processes: int = 1
    ep_size: int = 1
    shape: dict[str, int] | None = None
    num_experts: int = 4
    top_k: int = 1
    bf16: bool = False
    bucket: int = 0
    more: tuple[str, ...] = ()

    def flags(self, folder: Path) -> list[str]:
        """Flags that the training program and the planner share."""
        deepspeed = json.loads((ROOT / "ds_configs" / f"{self.stage}.json").read_text())
        if self.bucket:
            deepspeed["zero_optimization"]["reduce_bucket_size"] = self.bucket
        file = folder / "deepspeed.json"
        file.write_text(json.dumps(deepspeed))
        words = ["--deepspeed", str(file)]
        words += ["--ep_size", str(self.ep_size), "--num_experts", str(self.num_experts)]
        words += ["--top_k_experts", str(self.top_k), "--bf16", str(self.bf16).lower()]
        words += ["--max_steps", str(STEPS), "--final_evaluation", "false"]
        words += ["--save_strategy", "no"]
        if self.shape is not None:
            words += ["--backbone_config", json.dumps(self.shape), "--pretrained", "none"]
            words += ["--prompt", "none", "--prompt_config", "{}", "--missing_type", "none"]
            words += ["--global_batch_size", str(16 * self.processes)]
        return [*words, *self.more]


QUICK = [
    Case("small", "zero2", shape=SMALL, num_experts=8, bucket=1_000_000, bf16=True),
    Case("small, spread", "zero1", 2, 2, shape=SMALL, top_k=2, bucket=1_000_000),
]
FULL = [
    Case("default recipe", "zero2"),
    Case("default recipe, spread", "zero1", processes=2, ep_size=2),
    Case("middle", "zero0", shape=MIDDLE),
    Case("middle", "zero1", shape=MIDDLE),
    Case("middle", "zero2", shape=MIDDLE),
    Case("middle, E 8 k 2", "zero2", shape=MIDDLE, num_experts=8, top_k=2),
    Case("middle, E 8 k 2", "zero1", shape=MIDDLE, num_experts=8, top_k=2, bf16=True),
    Case("middle, E 8 k 2", "zero2", shape=MIDDLE, num_experts=8, top_k=2, bf16=True),
    Case("middle, 2 micro-batches", "zero2", shape=MIDDLE, bf16=True,
         more=("--gradient_accumulation_steps", "2")),
    Case("middle, 2 micro-batches", "zero1", shape=MIDDLE,
         more=("--gradient_accumulation_steps", "2")),
    Case("middle, towers locked", "zero2", shape=MIDDLE, bf16=True,
         more=("--lock_image", "true", "--lock_text", "true")),
    Case("middle", "zero2_offload", shape=MIDDLE),
    Case("wide batch", "zero2", shape=NARROW, bucket=1_000_000, bf16=True,
         more=("--global_batch_size", "256")),
    Case("wide batch, blocks twice", "zero2", shape=NARROW, bucket=1_000_000, bf16=True,
         more=("--global_batch_size", "256", "--activation_checkpointing", "true")),
    Case("middle, spread", "zero0", processes=2, ep_size=2, shape=MIDDLE),
    Case("middle, spread", "zero1", processes=2, ep_size=2, shape=MIDDLE, num_experts=8),
    Case("middle, spread k 2", "zero2", processes=2, ep_size=2, shape=MIDDLE, num_experts=8,
         top_k=2, bf16=True),
    Case("middle, replicated", "zero2", processes=2, shape=MIDDLE, bf16=True),
]  # fmt: skip


class MeasuredError(Exception):
    """Ends a measured run behind its last step, and carries what was found."""

    def __init__(self, found: dict[str, Any]) -> None:
        super().__init__("measured")
        self.found = found


def measure(argv: list[str]) -> dict[str, Any]:
    """Train in this process, which may be one of several, and say what was allocated.

    Args:
        argv: flags of the training program.
    """
    from mm_moe.training.trainer import MultimodalTrainer

    start_rss = _status("VmRSS")
    texts: list[tuple[int, float]] = []
    train, compute_loss = MultimodalTrainer.train, MultimodalTrainer.compute_loss
    meter = PeakMemory()

    def measured_train(self: Any, **kwargs: Any) -> None:
        built, meter.peak = meter.peak, meter.live
        train(self, **kwargs)
        found = {
            "build": built,
            "peak": meter.peak,
            "rss": _status("VmHWM") - start_rss,
            "text_tokens": max((length for length, _ in texts), default=0),
            "real_text_tokens": sum(real for _, real in texts) / max(len(texts), 1),
        }
        raise MeasuredError(found)

    def watched_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if "text" in inputs.inputs:
            mask_NL = inputs.inputs["text"]["attention_mask"]
            texts.append((mask_NL.shape[1], float(mask_NL.sum() / len(mask_NL))))
        return compute_loss(self, model, inputs, *args, **kwargs)

    MultimodalTrainer.train = measured_train  # type: ignore[method-assign, assignment]
    MultimodalTrainer.compute_loss = watched_loss  # type: ignore[method-assign]
    words, sys.argv = sys.argv, [str(TRAIN), *argv]
    try:
        with meter:
            runpy.run_path(str(TRAIN), run_name="__main__")
    except MeasuredError as ended:
        return ended.found
    finally:
        sys.argv = words
        MultimodalTrainer.train = train  # type: ignore[method-assign]
        MultimodalTrainer.compute_loss = compute_loss  # type: ignore[method-assign]
    raise SystemExit("the run ended before its first step")


def work(folder: Path, argv: list[str]) -> None:
    """One process of a case: measure, and write it down."""
    from mm_moe.training import runtime

    torch.set_num_threads(1)
    found = measure(argv)
    (folder / f"{runtime.rank()}.json").write_text(json.dumps(found))
    runtime.barrier()
    runtime.stop()


def _status(key: str) -> int:
    """A size of this process in bytes, 0 where the system does not say."""
    file = Path("/proc/self/status")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key)), 0)


def plan_flags(ranks: list[dict[str, Any]]) -> list[str]:
    """What the planner has to know of the machine and of the texts that came."""
    words = ["--gpu", "cpu", "--world_size", str(len(ranks))]
    for flag in ("text_tokens", "real_text_tokens"):
        words += [f"--{flag}", str(max(rank[flag] for rank in ranks))]
    return words


def compare(case: Case, ranks: list[dict[str, Any]], plan: dict[str, Any]) -> dict[str, Any]:
    """A row of the table from what the processes found and what the planner wrote."""
    own = plan["memory"][plan["own_stage"]]
    measured = max(rank["peak"] for rank in ranks)
    estimated = own["device"] + own["host"]
    return {
        **asdict(case),
        "estimated": estimated,
        "measured": measured,
        "ratio": estimated / measured,
        "build_ratio": plan["host_bytes_while_building"] / max(rank["build"] for rank in ranks),
        "process_growth": max(rank["rss"] for rank in ranks),
        "parts": own,
    }


def run_case(case: Case) -> dict[str, Any]:
    """Train, plan, compare, each in processes of their own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        launcher = [sys.executable]
        if case.processes > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone"]
            launcher += ["--nproc_per_node", str(case.processes)]
        launcher += ["-m", "eval.benchmarks.memory_estimate", "--worker", name]
        flags, file = case.flags(folder), folder / "plan.json"
        _call([*launcher, "--", *flags, "--output_dir", str(folder / "run")])
        ranks = [json.loads(found.read_text()) for found in sorted(folder.glob("[0-9].json"))]
        _call([sys.executable, str(PLAN), "--json", str(file), *plan_flags(ranks), *flags])
        return compare(case, ranks, json.loads(file.read_text()))


def _call(words: list[str]) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}:\n{done.stderr[-3000:]}")


def line(row: dict[str, Any]) -> str:
    """One line of the table."""
    mib = 2**20
    precision = "bf16" if row["bf16"] else "float32"
    return (
        f"{row['name']:26} {row['stage']:14} {row['processes']}x{row['ep_size']} {precision:8}"
        f"{row['estimated'] / mib:9.0f} MiB{row['measured'] / mib:9.0f} MiB {row['ratio']:6.3f}"
        f"   building {row['build_ratio']:.3f}"
        f"   process grew {row['process_growth'] / mib:7.0f} MiB"
    )


def main() -> None:
    """Run the cases, print, store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two small cases; not stored")
    parser.add_argument("--only", type=int, nargs="+", help="numbers of cases; not stored")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker, [word for word in options.flags if word != "--"])
        return
    cases = QUICK if options.quick else FULL
    if options.only:
        cases = [cases[number] for number in options.only]
    rows = []
    for case in cases:
        rows.append(run_case(case))
        print(line(rows[-1]), flush=True)
    ratios = [row["ratio"] for row in rows]
    result = {
        "benchmark": "memory_estimate",
        "figures": {
            "memory_estimate_over_measured_min": min(ratios),
            "memory_estimate_over_measured_max": max(ratios),
        },
        "command": "python -m eval.benchmarks.memory_estimate",
        "rows": rows,
        **describe_machine(),
    }
    if not (options.quick or options.only):
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "memory_estimate.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: result[k] for k in ("benchmark", "figures", "machine", "commit")}))


if __name__ == "__main__":
    main()
