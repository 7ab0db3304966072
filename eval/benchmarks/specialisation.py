"""Which modality the experts of one tower work for, with and without LIMoE's entropy losses.

    python -m eval.benchmarks.specialisation --data_dir DATA            # about five minutes
    python -m eval.benchmarks.specialisation --data_dir DATA --quick    # a few steps; not stored

DATA holds `openclipart/openclipart.parquet`. Images and texts go through the same blocks, of which
every second has eight experts, one for each token (`--backbone_config '{"one_tower": true}'`).
`balance` has the load-balance loss, of each modality by itself: each has to use all experts alike.
`entropy` has LIMoE's losses in its place (Mustafa et al. 2022): a text token should be decided, and
a modality may settle on some experts without cost, texts on 3 and images on 6.

The pictures lie in --output. Stored are, for each block, the experts' shares of each modality's
tokens in the last log, and how far the modalities keep apart by step (0 the same experts alike, 1
none in common; `eval.specialisation.separation`). The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from eval.benchmarks.moe_layer import RESULTS, describe_machine
from eval.pictures import save_png
from eval.report import read_metrics
from eval.specialisation import picture, summary

ROOT = Path(__file__).parents[2]
EXPERTS, STEPS = 8, 120
ENTROPY = {
    "by_modality": {
        "text": {
            "local_entropy_coef": 0.04,
            "global_entropy_coef": 0.04,
            "global_entropy_threshold": round(math.log(3), 4),
        },
        "image": {"global_entropy_coef": 0.04, "global_entropy_threshold": round(math.log(6), 4)},
    }
}
CASES = {
    "balance": [],
    "entropy": ["--router_aux_loss_coef", "0", "--moe_config", json.dumps(ENTROPY)],
}


def train(case: str, options: argparse.Namespace) -> Path:
    """The folder of a run, which is made unless it is there."""
    folder: Path = options.output / f"limoe-{case}"
    if (folder / "report.html").is_file():
        return folder
    words = [sys.executable, str(ROOT / "launch" / "train.py")]
    words += ["--config", "pretrain/recipes/small_clip_sparse.yaml"]
    words += ["--data_dir", str(options.data_dir), "--output_dir", str(folder), "--seed", "0"]
    words += ["--backbone_config", json.dumps({"one_tower": True}), "--moe_mode", "sparse"]
    words += ["--num_experts", str(EXPERTS), "--top_k_experts", "1", "--save_strategy", "no"]
    words += ["--max_steps", str(4 if options.quick else STEPS), "--eval_strategy", "no"]
    words += ["--resume_from_checkpoint", "auto", *CASES[case]]
    words += ["--logging_steps", "2"] if options.quick else []
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{case}: {done.stderr[-2000:]}")
    return folder


def table(case: str, found: dict[str, Any]) -> list[str]:
    """Lines for the terminal: each expert's share of images, by block."""
    lines = []
    for block, values in found["blocks"].items():
        shares = ["  - " if v is None else f"{100 * v:3.0f}%" for v in values["expert_share"]]
        apart = values["separation"][-1]
        lines.append(f"{case:8} block {block}: images {' '.join(shares)}, separation {apart:.2f}")
    return lines


def main() -> None:
    """Train both, print, draw, store."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, help="folder of the runs (default: a new one)")
    parser.add_argument("--quick", action="store_true", help="few steps; not stored")
    options = parser.parse_args()
    options.output = options.output or Path(tempfile.mkdtemp(prefix="specialisation-"))
    found, pictures, losses = {}, {}, {}
    for case in CASES:
        metrics = read_metrics(train(case, options) / "metrics.jsonl")
        found[case], pictures[case] = summary(metrics), picture(metrics)
        losses[case] = [row for row in metrics if "loss" in row][-1]["loss/contrastive"]
        print(*table(case, found[case]), sep="\n", flush=True)
    blocks = {case: one["blocks"].values() for case, one in found.items()}
    result = {
        "benchmark": "specialisation",
        "figures": {
            f"separation_of_modalities_{case}": statistics.fmean(v["separation"][-1] for v in of)
            for case, of in blocks.items()
        },
        "command": "python -m eval.benchmarks.specialisation --data_dir DATA",
        "settings": {"experts": EXPERTS, "steps": STEPS, "entropy": ENTROPY},
        "last_contrastive_loss": losses,
        "runs": found,
        **describe_machine(),
    }
    for case, figure in pictures.items():
        if figure is not None:
            save_png(figure, options.output / f"specialisation_{case}.png")
    if not options.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "specialisation.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: result[k] for k in ("benchmark", "figures", "machine", "commit")}))


if __name__ == "__main__":
    main()
