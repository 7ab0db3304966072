"""Contrastive pretraining: a dense small CLIP, a sparse one, and a sparse one made from the dense.

    python -m eval.benchmarks.pretraining --data_dir DATA            # three seeds, about an hour
    python -m eval.benchmarks.pretraining --data_dir DATA --quick    # one seed of a few steps

DATA holds `openclipart/openclipart.parquet`. For each seed the real program trains
`pretrain/recipes/small_clip_dense` and `small_clip_sparse` from scratch, and goes on from the dense
model twice with one schedule: as it is, and upcycled (`small_clip_upcycled`). A token visits one
expert of the dense width, or four of a quarter of it, so all models compute the same active FLOPs
in a step but for the routers.

The losses of training and of pairs that it never saw (the validation split, in batches of the same
size) stand beside each other, since each picture is seen several times. Other scores: recall
between those pairs, and emojis of the test split into nine categories by name. Runs are kept in
--output and are not repeated. Loss and recall by step are drawn there, too. The last line is one
JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from eval.benchmarks.moe_layer import RESULTS, describe_machine
from mm_moe.batch import IMAGE, TEXT, Sample
from mm_moe.data.collate import Collator
from mm_moe.data.schema import NO_LABEL
from mm_moe.data.sets.openclipart import OpenclipartEmojiData
from mm_moe.models.folder import load_model
from mm_moe.models.processing import processors_for
from mm_moe.training.embed import embed
from pretrain.contrastive import contrastive_loss

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[2]
PROGRAM = ROOT / "launch" / "train.py"
LOSS = "loss/contrastive"
HELD_OUT_BATCH = 128  # pairs that are told apart, as in training
SMOOTH = 5  # logged values averaged; each is the mean of 10 steps
MODELS = {  # name -> recipe, and the model that it starts from
    "dense": ("small_clip_dense", None),
    "sparse": ("small_clip_sparse", None),
    "dense, continued": ("small_clip_dense", "dense"),
    "upcycled": ("small_clip_upcycled", "dense"),
}
PAIRS = (("dense", "sparse"), ("dense, continued", "upcycled"))  # (base, sparse)
CONTINUED = ["--max_steps", "200", "--learning_rate", "5e-4"]  # of the recipe small_clip_upcycled


def folder_of(output: Path, model: str, seed: int) -> Path:
    """Where a run lies."""
    return output / f"{model.replace(', ', '-')}-{seed}"


def train(model: str, seed: int, options: argparse.Namespace) -> dict[str, Any] | None:
    """Train one model, unless it is there, and return its curve and scores.

    None for a model that is not there where only finished runs are asked for.
    """
    recipe, start = MODELS[model]
    folder = folder_of(options.output, model, seed)
    if not (folder / "report.html").is_file():
        if options.finished:
            return None
        words = [sys.executable, str(PROGRAM), "--config", f"pretrain/recipes/{recipe}.yaml"]
        words += ["--data_dir", str(options.data_dir), "--output_dir", str(folder)]
        words += ["--seed", str(seed), "--resume_from_checkpoint", "auto"]
        if start:
            words += ["--pretrained", str(folder_of(options.output, start, seed) / "final")]
        if model == "dense, continued":
            words += CONTINUED
        if options.quick:
            words += ["--max_steps", "4", "--logging_steps", "2", "--eval_strategy", "no"]
        begin = time.monotonic()
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise SystemExit(f"{model}, seed {seed}: {done.stderr[-2000:]}")
        print(f"{model}, seed {seed}: {time.monotonic() - begin:.0f} s", flush=True)
    return {"seed": seed, **read(folder, options.data_dir)}


def read(folder: Path, data_dir: Path) -> dict[str, Any]:
    """The loss by step, held-out recall by step, the final scores and the speed of a run."""
    entries = entries_of(folder)
    recall = "eval_openclipart_emoji_text_retrieval_recall@5"
    document = json.loads((folder / "zero_shot-validation.json").read_text())
    scores = {k: v for row in document["rows"] for k, v in row["metrics"].items()}
    scores["held_out_loss"] = held_out_loss(folder / "final", data_dir)
    trained = [e for e in entries if LOSS in e]
    return {
        "data_wait_share": statistics.median(e["perf/data_wait_share"] for e in trained),
        "samples_per_second": statistics.median(e["perf/samples_per_second"] for e in trained),
        "loss": [[e["step"], e[LOSS]] for e in trained],
        "recall@5": [[e["step"], e[recall]] for e in entries if recall in e],
        "scores": scores,
        "chance": {k: v for row in document["rows"] for k, v in row["chance"].items()},
    }


def entries_of(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def held_out_loss(folder: Path, data_dir: Path) -> float:
    """Mean contrastive loss of a model over the validation pairs, in batches of training's size.

    Pairs of the same order for every model; those beyond the last full batch are left out.
    """
    cached = folder.parent / "held_out_loss.json"
    if cached.is_file():
        return float(json.loads(cached.read_text()))
    source = OpenclipartEmojiData(str(data_dir), with_keywords=True)
    pairs = (source.to_sample(row) for row in source.stream("validation"))
    whole = [sample for sample in pairs if len(sample.payload) == 2]
    model = load_model(folder)
    collate = Collator(
        modalities=source.modalities,
        processors=processors_for(model.config, source=str(folder)),
        problem_type=NO_LABEL,
        num_labels=0,
        max_bad_samples=len(whole),
    )
    losses = [
        _loss_of(model, collate, whole[start : start + HELD_OUT_BATCH])
        for start in range(0, len(whole) - HELD_OUT_BATCH + 1, HELD_OUT_BATCH)
    ]
    cached.write_text(json.dumps(statistics.fmean(losses)))
    return statistics.fmean(losses)


def _loss_of(model: Any, collate: Collator, samples: list[Sample]) -> float:
    found = embed(model, [collate(samples)], modalities=(IMAGE, TEXT))
    both = sorted(set(found[IMAGE].ids) & set(found[TEXT].ids))
    image_BD, text_BD = (torch.from_numpy(found[name].of(both)) for name in (IMAGE, TEXT))
    complete_B = torch.ones(len(both), dtype=torch.bool)
    scale = model.logit_scale.detach()
    return float(contrastive_loss(image_BD, text_BD, complete_B, scale))


def smoothed(curve: list[list[float]]) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the mean of the last few logged losses at each."""
    steps, values = np.array(curve).T
    width = min(SMOOTH, len(values))
    return steps[width - 1 :], np.convolve(values, np.ones(width) / width, mode="valid")


def steps_to_reach(base: list[list[float]], other: list[list[float]]) -> dict[str, Any]:
    """When `other` first has the final smoothed loss of `base`, as a share of the steps of `base`.

    Returns:
        "share" and "steps" (None: not reached), and both final losses.
    """
    base_steps, base_values = smoothed(base)
    target = base_values[-1]
    steps, values = smoothed(other)
    reached = steps[values <= target]
    first = int(reached[0]) if len(reached) else None
    share = None if first is None else first / float(base_steps[-1])
    found = {"share": share, "steps": first}
    return {**found, "base_loss": float(target), "loss": float(values[-1])}


def gap_at_same_step(base: list[list[float]], other: list[list[float]]) -> dict[str, float]:
    """Smoothed loss of `other` less that of `base` at the last step that both have logged."""
    first, second = (dict(zip(*smoothed(curve), strict=True)) for curve in (base, other))
    step = max(first.keys() & second.keys())
    return {"step": int(step), "gap": float(second[step] - first[step])}


def unfinished(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """What there is of the curves of runs that have not ended yet."""
    found: dict[str, list[dict[str, Any]]] = {}
    for model, seed in itertools.product(MODELS, options.seeds):
        folder = folder_of(options.output, model, seed)
        if (folder / "report.html").is_file() or not (folder / "metrics.jsonl").is_file():
            continue
        loss = [[e["step"], e[LOSS]] for e in entries_of(folder) if LOSS in e]
        if len(loss) >= SMOOTH:
            found.setdefault(model, []).append({"seed": seed, "loss": loss})
    return found


def curves_of(run: dict[str, Any]) -> dict[str, Any]:
    """What of a run is drawn."""
    return {key: run[key] for key in ("loss", "recall@5")}


def spread(values: list[float]) -> dict[str, float]:
    """Mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": deviation}


def draw(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Loss and held-out recall by step, mean over the seeds."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    for model, runs in found.items():
        offset = 0 if MODELS[model][1] is None else found["dense"][0]["loss"][-1][0]
        curves = [smoothed(run["loss"]) for run in runs]
        left.plot(curves[0][0] + offset, np.mean([v for _, v in curves], axis=0), label=model)
        if recalls := [np.array(run["recall@5"]) for run in runs if run["recall@5"]]:
            mean = np.mean([curve[:, 1] for curve in recalls], axis=0)
            right.plot(recalls[0][:, 0] + offset, 100 * mean, label=model)
    left.set(xlabel="step", ylabel="contrastive loss (training)")
    right.set(xlabel="step", ylabel="held-out image to text recall@5, %")
    left.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def summary(
    found: dict[str, list[dict[str, Any]]], begun: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """Tables over the seeds; of runs that have only `begun`, the loss at the same step."""
    table = {
        model: {
            **{k: spread([run["scores"][k] for run in runs]) for k in runs[0]["scores"]},
            "final_loss": spread([float(smoothed(run["loss"])[1][-1]) for run in runs]),
            "data_wait_share": spread([run["data_wait_share"] for run in runs]),
            "samples_per_second": spread([run["samples_per_second"] for run in runs]),
            "seeds": [run["seed"] for run in runs],
        }
        for model, runs in found.items()
    }
    reached = {
        f"{other} against {base}": [
            {"seed": a["seed"], **steps_to_reach(a["loss"], b["loss"])}
            for a, b in same_seed(found[base], found[other])
        ]
        for base, other in PAIRS
        if base in found and other in found
    }
    gaps = {
        f"{other} against {base}": [
            {"seed": a["seed"], **gap_at_same_step(a["loss"], b["loss"])}
            for a, b in same_seed(found[base], found.get(other, []) + begun.get(other, []))
        ]
        for base, other in PAIRS
        if base in found
    }
    return {"table": table, "steps_to_dense_loss": reached, "gap_at_same_step": gaps}


def same_seed(
    left: list[dict[str, Any]], right: list[dict[str, Any]]
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Pairs of runs of one seed."""
    of_seed = {run["seed"]: run for run in right}
    return [(run, of_seed[run["seed"]]) for run in left if run["seed"] in of_seed]


def main() -> None:
    """Train, print, draw, store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, help="folder of the runs (default: a new one)")
    parser.add_argument("--quick", action="store_true", help="one seed, few steps; not stored")
    parser.add_argument("--finished", action="store_true", help="train nothing: read --output")
    options = parser.parse_args()
    options.output = options.output or Path(tempfile.mkdtemp(prefix="pretraining-"))
    seeds = options.seeds[:1] if options.quick else options.seeds
    found: dict[str, list[dict[str, Any]]] = {model: [] for model in MODELS}
    for seed in seeds:
        for model, runs in found.items():
            if run := train(model, seed, options):
                runs.append(run)
    found = {model: runs for model, runs in found.items() if runs}
    begun = unfinished(options)
    result: dict[str, Any] = {
        "benchmark": "pretraining",
        "figures": {},
        "seeds": seeds,
        "command": "python -m eval.benchmarks.pretraining --data_dir DATA --seeds "
        + " ".join(map(str, seeds)),
        "chance": found["dense"][0]["chance"],
        **summary(found, begun),
        "unfinished": begun,
        "curves": {model: [curves_of(run) for run in runs] for model, runs in found.items()},
        **describe_machine(),
    }
    for name, rows in result["steps_to_dense_loss"].items():
        key = name.split()[0]
        shares = [row["share"] for row in rows if row["share"] is not None]
        result["figures"][f"{key}_runs_that_reach_dense_loss"] = f"{len(shares)} of {len(rows)}"
        if shares:
            mean = statistics.fmean(shares)
            result["figures"][f"{key}_share_of_steps_to_dense_loss"] = mean
    for name, rows in result["gap_at_same_step"].items():
        if rows:
            gap = statistics.fmean(row["gap"] for row in rows)
            result["figures"][f"{name.split()[0]}_loss_less_dense_at_same_step"] = gap
    for model, cells in result["table"].items():
        shown = "  ".join(
            f"{k} {c['mean']:.3f} +- {c['std']:.3f}"
            for k, c in cells.items()
            if "@10" not in k and k != "seeds"
        )
        print(f"{model:18} {shown}")
    draw(found, options.output / "pretraining.png")
    if not options.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "pretraining.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: result[k] for k in ("benchmark", "figures", "machine", "commit")}))


if __name__ == "__main__":
    main()
