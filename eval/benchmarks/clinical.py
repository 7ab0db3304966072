r"""Fills of missing clinical modalities in one harness: TCGA-LUAD by fold, PhysioNet 2012 by seed.

    python -m eval.benchmarks.clinical --data tcga_luad --data_dir DIR --output FOLDER
    python -m eval.benchmarks.clinical --data physionet2012 --data_dir DIR --output FOLDER

Every method has the same towers, fusion width, steps and masks, those of the data set's recipe in
`finetune/recipes/`, and is trained by `launch/train.py` with natural gaps and imposed ones. Where a
data set has two learning rates, the first fold is trained with both, the mean AUROC of its
*validation* split over the test patterns takes one for each method, and the other folds are trained
with that alone. The same command goes on where it stopped; a fold that is finished is not looked at
again. Differences between methods are paired (the same patients lack the same things); their
intervals are a bootstrap over the patients of all folds. The last line is one JSON object.

Axes: N patients of a test split, V distinct scores of them, R resamples.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from eval.benchmarks.av_mnist import spread
from eval.benchmarks.moe_layer import RESULTS, describe_machine
from eval.predictions import PredictionFile
from eval.resamples import interval_of, over_seeds

METRIC, METRICS = "auroc", ("auroc", "auprc", "macro_f1", "brier", "ece")
RETRIEVERS = ("retriever", "retriever_zero", "retriever_draws", "similar_retriever")
RESAMPLES = 1000
TRAIN = "subset:0.5"
TESTS = ("complete", "subset:0.3", "subset:0.5", "subset:0.7")
MISSING = "mean of the imposed"
NAMED = {"complete": "natural", **{t: f"natural + {t[7:]} imposed" for t in TESTS[1:]}}
SETS: dict[str, dict[str, Any]] = {
    "tcga_luad": {
        "runs": [({"label": "never_smoker", "fold": fold}, fold) for fold in range(5)],
        "flex": {"dropout": 0.3, "num_experts": 32},
        "supports": 16,
        "rates": ("0.001", "0.0003"),
    },
    "physionet2012": {
        "runs": [({"label": "death", "split_series": True}, seed) for seed in range(5)],
        "flex": {"dropout": 0.1, "num_experts": 8},
        "supports": 4,
        "rates": ("0.001",),  # of the recipe: here a training costs three times as much
    },
}


def methods_of(data: str) -> dict[str, list[str]]:
    """Method -> its own flags of `launch/train.py`."""
    about = SETS[data]
    flex = json.dumps({**about["flex"], "sparse": "alternate", "router": "flex", "top_k": 4})
    ours = {"around_default": True, "num_draws": 8}
    similar = json.dumps({**ours, "num_supports": about["supports"]})
    methods = {
        "zero": ["--fill", "zero"],
        "zero_flex": ["--fill", "zero", "--fusion_config", flex],
        "mean": ["--fill", "mean"],
        "default": ["--fill", "default"],
        "neighbour": ["--fill", "neighbour"],
        "bank": ["--fill", "bank", "--fusion_config", flex],
        "modality_dropout": ["--fill", "zero", "--modality_dropout", "0.3"],
        "drop_incomplete": ["--fill", "zero", "--drop_incomplete", "true"],
        "retriever_legacy": ["--fill", "retriever", "--fill_config", '{"legacy": true}'],
        "retriever_figure": ["--fill", "retriever"],
        "retriever_draws": ["--fill", "retriever", "--fill_config", '{"num_draws": 8}'],
        "retriever_zero": [
            *("--fill", "retriever"),
            *("--fill_config", '{"around_zero": true, "num_draws": 8}'),
        ],
        "retriever": ["--fill", "retriever", "--fill_config", json.dumps(ours)],
        "retriever_flex": [
            *("--fill", "retriever", "--fill_config", json.dumps(ours)),
            *("--fusion_config", flex),
        ],
        "similar_retriever": ["--fill", "similar_retriever", "--fill_config", similar],
    }
    for words in methods.values():
        if "--fill_config" not in words:
            words += ["--fill_config", "{}"]  # not that of the recipe
    return methods


def grid_words(
    data: str, number: int, rates: dict[str, tuple[str, ...]], *, data_dir: str, folder: Path
) -> list[str]:
    """The command line of `eval.grid` for one fold or seed."""
    options, seed = SETS[data]["runs"][number]
    words = ["--fork", "--jobs", "2", "--drop_models", "--resamples", "1"]
    words += ["--config", f"finetune/recipes/{data}.yaml", "--data_dir", data_dir]
    words += ["--dataset_options", json.dumps(options)]
    for name, own in methods_of(data).items():
        for rate in rates[name]:
            flags = shlex.join([*own, "--learning_rate", rate])
            words += ["--variant", f"{name}-{rate}={flags}"]
    words += ["--train", TRAIN, "--test", *TESTS, "--seeds", str(seed)]
    return [*words, "--output", str(grid_folder(data, number, folder))]


def best_rates(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Method -> learning rate -> mean AUROC of the validation split over the test patterns."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in result["table"]:
        if row["split"] == "validation" and row["metric"] == METRIC and row["test"] in TESTS:
            method, rate = row["method"].split("-", 1)
            found.setdefault(method, {}).setdefault(rate, []).append(row["mean"])
    return {
        method: {rate: statistics.fmean(values) for rate, values in by_rate.items()}
        for method, by_rate in found.items()
    }


def chosen_of(validated: dict[str, dict[str, float]]) -> dict[str, str]:
    """Method -> the learning rate with the highest score."""
    return {method: max(scores, key=lambda r: scores[r]) for method, scores in validated.items()}


def run_all(data: str, count: int, *, data_dir: str, folder: Path) -> dict[str, dict[str, float]]:
    """Run what is not finished of every fold or seed; the learning rates' validation scores."""
    rates: dict[str, tuple[str, ...]] = dict.fromkeys(methods_of(data), SETS[data]["rates"])
    validated: dict[str, dict[str, float]] = {}
    for number in range(count):
        words = grid_words(data, number, rates, data_dir=data_dir, folder=folder)
        if not (grid_folder(data, number, folder) / "results.json").is_file():
            subprocess.run([sys.executable, "-m", "eval.grid", *words], check=True)
        if not number:
            validated = best_rates(read(data, number, folder))
            rates = {method: (rate,) for method, rate in chosen_of(validated).items()}
    return validated


def grid_folder(data: str, number: int, folder: Path) -> Path:
    """Where the grid of one fold or seed is."""
    return folder / f"{data}-{number}"


def read(data: str, number: int, folder: Path) -> dict[str, Any]:
    """What the grid of one fold or seed wrote."""
    return json.loads((grid_folder(data, number, folder) / "results.json").read_text())


def table_of(data: str, rates: dict[str, str], folder: Path, *, count: int) -> list[dict[str, Any]]:
    """Test scores by method, pattern and metric over the folds or seeds, chance beside."""
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for number in range(count):
        for row in read(data, number, folder)["table"]:
            method, rate = row["method"].split("-", 1)
            if row["split"] == "test" and rates[method] == rate and row["metric"] in METRICS:
                found.setdefault((method, row["test"], row["metric"]), []).append(row)
    return [
        {"method": method, "test": NAMED.get(test, MISSING), "metric": metric}
        | spread([row["mean"] for row in rows])
        | {"chance": statistics.fmean(row["chance"] for row in rows)}
        | {"values": [row["mean"] for row in rows]}
        for (method, test, metric), rows in found.items()
    ]


def auroc_of(labels_N: np.ndarray, score_N: np.ndarray, weight_RN: np.ndarray) -> np.ndarray:
    """Area under the ROC curve (R,) with rows counted as often as `weight_RN` says; ties half.

    One half where a class is not there.
    """
    order_N = np.argsort(score_N, kind="stable")
    starts = np.flatnonzero(np.diff(score_N[order_N], prepend=-np.inf))
    weight_RN = weight_RN[:, order_N].astype(np.float32)
    died_N = labels_N[order_N] == 1
    one_RV, zero_RV = (
        np.add.reduceat(weight_RN * kind_N, starts, axis=1) for kind_N in (died_N, ~died_N)
    )
    below_RV = zero_RV.cumsum(1) - zero_RV / 2
    pairs_R = one_RV.sum(1) * zero_RV.sum(1)
    return np.where(pairs_R > 0, (one_RV * below_RV).sum(1) / np.maximum(pairs_R, 1), 0.5)


def resampled_runs(
    data: str, rates: dict[str, str], folder: Path, *, count: int
) -> dict[str, np.ndarray]:
    """Method -> AUROC (runs, tests, 1 + R): on all patients, then on R resamples of them.

    Methods have the same resamples. Seeds that share a test split share its resamples, too, so
    that an interval is about patients; folds have their own.
    """
    found: dict[str, list[np.ndarray]] = {method: [] for method in rates}
    for number, (options, seed) in enumerate(SETS[data]["runs"][:count]):
        weight_RN: np.ndarray | None = None
        for method, rate in rates.items():
            cell = f"{method}-{rate}__{TRAIN.replace(':', '-')}__seed-{seed}"
            run = grid_folder(data, number, folder) / "cells" / cell / "run"
            file = PredictionFile.load(run / "predictions-test.npz")
            if weight_RN is None:
                generator = np.random.default_rng(options.get("fold", 0))
                size = len(file.ids)
                drawn = generator.multinomial(size, np.full(size, 1 / size), RESAMPLES)
                weight_RN = np.concatenate([np.ones((1, size), int), drawn])
            margins = {test: np.diff(file.logits[test], axis=1)[:, 0] for test in TESTS}
            values = [auroc_of(file.labels[test], margins[test], weight_RN) for test in TESTS]
            found[method].append(np.array(values))
    return {method: np.array(values) for method, values in found.items()}


def pairs_of(found: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """Each retriever minus every other method: AUROC, with intervals over patients and runs."""
    rows = []
    for ours in [name for name in RETRIEVERS if name in found]:
        for other in [name for name in found if name != ours]:
            apart = found[ours] - found[other]
            for name, at in {NAMED["complete"]: [0], MISSING: [1, 2, 3]}.items():
                of_runs = apart[:, at].mean(1)
                low, high = over_seeds(of_runs[:, 0].tolist()) or (None, None)
                rows.append(
                    {"method": ours, "other": other, "test": name, "metric": METRIC}
                    | interval_of(of_runs.mean(0))
                    | {"runs_low": low, "runs_high": high, "values": of_runs[:, 0].tolist()}
                )
    return rows


def figures_of(table: list[dict[str, Any]], pairs: list[dict[str, Any]]) -> dict[str, float]:
    """The numbers that tell the benchmark in short: means of AUROC, and differences, in points."""
    mean = {
        (row["method"], row["test"]): 100 * row["mean"] for row in table if row["metric"] == METRIC
    }
    figures = {
        f"{m}_auroc_{'missing' if t == MISSING else 'natural'}": mean[m, t]
        for m, t in mean
        if t in (MISSING, NAMED["complete"])
    }
    for row in pairs:
        if row["test"] == MISSING:
            figures[f"{row['method']}_minus_{row['other']}"] = 100 * row["difference"]
    return figures


def show(table: list[dict[str, Any]], pairs: list[dict[str, Any]]) -> None:
    """Print the table of the headline, and the differences."""
    methods = list(dict.fromkeys(row["method"] for row in table))
    tests = list(dict.fromkeys(row["test"] for row in table))
    print(f"{METRIC}, mean and standard deviation in points\n{'':20}", *(f"{t:>24}" for t in tests))
    for method in methods:
        of = {r["test"]: r for r in table if (r["method"], r["metric"]) == (method, METRIC)}
        cells = (f"{100 * of[t]['mean']:.1f} +- {100 * of[t]['std']:.1f}" for t in tests)
        print(f"{method:20}", *(f"{cell:>24}" for cell in cells))
    for row in pairs:
        low, high = 100 * row["low"], 100 * row["high"]
        apart = f"{100 * row['difference']:+.1f} [{low:+.1f}, {high:+.1f}]"
        print(f"{row['test']:24} {row['method']} - {row['other']}: {apart}")


def main() -> None:
    """Run, merge, print, store."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", required=True, choices=list(SETS))
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder of the trainings")
    parser.add_argument("--runs", type=int, default=5, help="first so many folds or seeds")
    options = parser.parse_args()
    data, folder, count = options.data, options.output, options.runs
    validated = run_all(data, count, data_dir=options.data_dir, folder=folder)
    rates = chosen_of(validated)
    table = table_of(data, rates, folder, count=count)
    pairs = pairs_of(resampled_runs(data, rates, folder, count=count))
    show(table, pairs)
    grids = [read(data, number, folder) for number in range(count)]
    result = {
        "benchmark": f"clinical_{data}",
        "command": f"python -m eval.benchmarks.clinical --data {data} --data_dir DIR --output DIR"
        + (f" --runs {count}" if count < len(SETS[data]["runs"]) else ""),
        "figures": figures_of(table, pairs),
        "runs": [{**chosen, "seed": seed} for chosen, seed in SETS[data]["runs"][:count]],
        "rows": [grid["data"]["splits"] for grid in grids],
        "trained_on": f"natural gaps + {TRAIN} imposed, for every method",
        "words": grids[0]["words"],
        "methods": {name: shlex.join(words) for name, words in methods_of(data).items()},
        "learning_rates": rates,
        "validation_auroc": validated,
        "table": table,
        "pairs": pairs,
        "resamples": RESAMPLES,
        "seconds": sum(grid["seconds"] for grid in grids),
        "commits": sorted({commit for grid in grids for commit in grid["commits"]}),
        **describe_machine(),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"clinical_{data}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: result[k] for k in ("benchmark", "figures", "machine", "commit")}))


if __name__ == "__main__":
    main()
