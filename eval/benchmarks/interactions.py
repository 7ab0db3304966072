"""Redundancy, uniqueness and synergy with known truth: categoriser, interaction experts, I2M2.

    python -m eval.benchmarks.interactions --quick    # one seed, fewer settings
    python -m eval.benchmarks.interactions            # 5 seeds, stored

Made data (`--dataset interaction_dial`) say of every sample how its label follows from two
modalities. Three tables:

* categoriser: how often cross-fitted predictors of one modality each recover the mechanism;
* experts: one sparse model of interaction experts against the same model with one classifier, a
  parameter-matched ensemble of three of these, and other ways to mix the same experts;
* family: one modality, product of both, joint model and the product of all (I2M2) over the dial.

All models are models of this library, trained here on one thread. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.benchmarks.interactions_family import REGIMES, family_rows
from eval.benchmarks.interactions_fit import (
    Split,
    answer,
    config_of,
    fit,
    new_model,
    size_of,
)
from eval.benchmarks.moe_layer import RESULTS, describe_machine
from mm_moe.batch import IGNORED_LABEL
from mm_moe.data.interactions.categories import NONE, categorise
from mm_moe.data.interactions.cross_fit import STRENGTHS, CrossFitted, folds_of
from mm_moe.data.sets.interaction_dial import MECHANISMS, InteractionDialData

TABLES = ("categoriser", "experts", "family")
SHARES = {"R": 0.45, "U_first": 0.15, "U_second": 0.15, "AS": 0.25}
HIDDEN = 64  # of the one classifier
EXPERT_HIDDEN = 28  # of each expert: the sparse model is no larger than three of the others
NOISE = 0.2
ENSEMBLE = 3
CATEGORY_OF = np.array([0, 1, 2, 3, 3])  # of each mechanism; xor is synergy, too
CATEGORISED: dict[str, dict[str, Any]] = {  # what the categoriser is tried on
    "random": {"shares": SHARES, "noise": NOISE},
    "wrong": {"shares": {**SHARES, "R": 0.6}, "noise": NOISE, "other": "wrong"},
    "xor": {"shares": {"xor": 1.0}, "noise": NOISE, "cue": False},
}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one seed, fewer settings")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--rows", type=int, nargs="+", default=[500, 2000])
    parser.add_argument("--epochs", type=int, default=60, help="at 500 rows; fewer with more rows")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.rows = [0], [500]
    return args


def codes_of(splits: Mapping[str, Split]) -> dict[str, np.ndarray]:
    """Split -> categories by predictors of one modality each, cross-fitted over train."""
    train = splits["train"]
    fold_N = folds_of(
        [str(n) for n in range(len(train.label_N))], dataset=InteractionDialData.name, num_folds=5
    )
    heads = [
        CrossFitted(STRENGTHS).fit(
            train.x_N2D[:, m].numpy(),
            label_N=train.label_N.numpy(),
            fold_N=fold_N,
            num_classes=2,
        )
        for m in range(2)
    ]
    found = {}
    for name, split in splits.items():
        said = [
            head.probability_NC if name == "train" else head.predict(split.x_N2D[:, m].numpy())
            for m, head in enumerate(heads)
        ]
        labels = split.label_N.numpy()
        found[name] = categorise([p_NC.argmax(-1) for p_NC in said], labels=labels)
    return found


def identifiable(truth: np.ndarray, label_N: np.ndarray) -> np.ndarray:
    """Rows (N,) whose mechanism follows from the bits and the label.

    Not those of uniqueness whose other bit happens to be right: they look redundant to everyone.
    Nor any of xor: a bit alone says nothing of the label, so no predictor of one modality shows it.
    """
    names_N = np.array(MECHANISMS)[truth[:, 0]]
    both_N = (truth[:, 1] == label_N) & (truth[:, 2] == label_N)
    unique_N = np.char.startswith(names_N, "U_")
    return (names_N != "xor") & ~(unique_N & both_N)


def categoriser_rows(seeds: Sequence[int], *, num_rows: int = 2000) -> list[dict[str, Any]]:
    """How often the category is the mechanism, on the test split."""
    rows = []
    for name, options in CATEGORISED.items():
        for seed in seeds:
            source = InteractionDialData(sizes=(num_rows, 10, 2000), seed=seed, **options)
            splits = {split: Split.of(source, split) for split in source.splits()}
            code_N, test = codes_of(splits)["test"], splits["test"]
            hit_N = code_N == CATEGORY_OF[test.truth[:, 0]]
            can_N = identifiable(test.truth, test.label_N.numpy())
            each = {m: hit_N[test.truth[:, 0] == q] for q, m in enumerate(MECHANISMS)}
            rows.append(
                {
                    "data": name,
                    "seed": seed,
                    "identifiable": float(hit_N[can_N].mean()) if can_N.any() else None,
                    "share_identifiable": float(can_N.mean()),
                    "all": float(hit_N.mean()),
                    **{m: float(hit.mean()) for m, hit in each.items() if len(hit)},
                }
            )
    return rows


def by_mechanism(prob_NC: torch.Tensor, test: Split) -> dict[str, float]:
    """Accuracy over all rows and over those of each mechanism."""
    hit_N = (prob_NC.argmax(-1) == test.label_N).numpy()
    found = {"all": float(hit_N.mean())}
    for q, name in enumerate(MECHANISMS):
        if (own := test.truth[:, 0] == q).any():
            found[name] = float(hit_N[own].mean())
    return found


def expert_row(seed: int, *, num_rows: int, epochs: int) -> dict[str, Any]:
    """Every method on one draw of the data."""
    source = InteractionDialData(shares=SHARES, noise=NOISE, sizes=(num_rows, 500, 2000), seed=seed)
    splits = {split: Split.of(source, split) for split in source.splits()}
    codes, test = codes_of(splits), splits["test"]
    baselines = [
        fit(
            new_model(config_of(source, head_hidden_size=HIDDEN), seed=100 * seed + n),
            splits,
            epochs=epochs,
            seed=n,
        )
        for n in range(ENSEMBLE)
    ]
    said = [answer(model, test).logits.softmax(-1) for model in baselines]
    found = {"baseline": said[0], "ensemble of 3": torch.stack(said).mean(0)}
    parameters = {"baseline": size_of(baselines[0])}
    parameters["ensemble of 3"] = ENSEMBLE * parameters["baseline"]
    kind_N = torch.from_numpy(np.where(codes["train"] == NONE, IGNORED_LABEL, codes["train"]))
    for name, target, kinds in (
        ("likelihood only", "exact", None),
        ("exact kinds", "exact", kind_N),
        ("kinds that explain", "compatible", kind_N),
    ):
        settings = {"hidden": EXPERT_HIDDEN, "fuser_hidden": HIDDEN, "fuser_target": target}
        model = new_model(config_of(source, interaction_experts=settings), seed=100 * seed)
        parameters["interaction experts"] = size_of(model)
        fit(model, splits, epochs=epochs, seed=0, kind_N=kinds)
        output = answer(model, test)
        found[name] = output.logits.exp()
    prob_NKC = output.interaction.logits_BKC.softmax(-1)  # of the last one
    every_N = torch.arange(len(prob_NKC))
    found["uniform mean"] = prob_NKC.mean(1)
    found["hard routing"] = prob_NKC[every_N, output.interaction.log_weight_BK.argmax(-1)]
    found["oracle (leaks)"] = prob_NKC[every_N, torch.from_numpy(codes["test"]).clamp(0, 3)]
    return {
        "seed": seed,
        "rows": num_rows,
        "parameters": parameters,
        "scores": {name: by_mechanism(prob_NC, test) for name, prob_NC in found.items()},
    }


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation over seeds."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def compare(rows: Sequence[Mapping[str, Any]], ours: str, theirs: str, part: str) -> dict[str, Any]:
    """Paired difference over seeds, in points."""
    gaps = [100 * (row["scores"][ours][part] - row["scores"][theirs][part]) for row in rows]
    mean, std = spread(gaps)
    return {
        "mean": round(mean, 2),
        "std": round(std, 2),
        "ahead": sum(gap > 0 for gap in gaps),
        "seeds": len(gaps),
    }


def show(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print methods by parts, mean and spread over seeds in percent."""
    methods, parts = list(rows[0]["scores"]), list(next(iter(rows[0]["scores"].values())))
    print(f"\n{title}\n{'':<22}" + "".join(f"{part:>14}" for part in parts))
    for method in methods:
        cells = [spread([100 * row["scores"][method][part] for row in rows]) for part in parts]
        print(f"{method:<22}" + "".join(f"{mean:>8.1f} ± {std:>3.1f}" for mean, std in cells))


def show_categoriser(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print recovery in percent."""
    print("\ncategoriser: share of test rows whose category is the mechanism")
    for name in CATEGORISED:
        own = [row for row in rows if row["data"] == name]
        parts = [key for key, value in own[0].items() if isinstance(value, float)]
        words = (f"{part} {spread([100 * row[part] for row in own])[0]:.1f}" for part in parts)
        print(f"  {name:<8}" + ", ".join(words))


def expert_table(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of all sizes and seeds, printed."""
    found = []
    for num_rows in args.rows:
        epochs = max(16, args.epochs * 500 // num_rows)
        own = [expert_row(seed, num_rows=num_rows, epochs=epochs) for seed in args.seeds]
        show(f"experts, {num_rows} training rows: accuracy", own)
        found += own
    return found


def family_table(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of all regimes and seeds, printed."""
    found = family_rows(args.seeds, regimes=REGIMES[-1:] if args.quick else REGIMES)
    for name in dict.fromkeys(row["data"] for row in found):
        show(f"family, {name}", [row for row in found if row["data"] == name])
    return found


def figures_of(tables: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What the tables say in few numbers; those of a table that was not made are left out."""
    found: dict[str, Any] = {}
    told = (row["identifiable"] for row in tables.get("categoriser", []))
    known = [float(value) for value in told if value is not None]
    if known:
        found["recovered_identifiable"] = round(min(known), 4)
    experts = tables.get("experts", [])
    for num_rows in dict.fromkeys(row["rows"] for row in experts):
        own = [row for row in experts if row["rows"] == num_rows]
        for ours in ("kinds that explain", "likelihood only", "exact kinds"):
            name = f"synergy, {ours} over ensemble of 3, {num_rows} rows"
            found[name] = compare(own, ours, "ensemble of 3", "AS")
    family = tables.get("family", [])
    for data in dict.fromkeys(row["data"] for row in family):
        own = [row for row in family if row["data"] == data]
        for theirs in ("intra", "inter"):
            found[f"I2M2 at once over {theirs}, {data}"] = compare(
                own, "I2M2, at once", theirs, "accuracy"
            )
    return found


def main() -> None:
    """Fill the tables that are asked for, print, and store a full run."""
    args = arguments()
    torch.set_num_threads(1)
    begin = time.process_time()
    tables: dict[str, list[dict[str, Any]]] = {}
    if "categoriser" in args.only:
        tables["categoriser"] = categoriser_rows(args.seeds)
        show_categoriser(tables["categoriser"])
    if "experts" in args.only:
        tables["experts"] = expert_table(args)
    if "family" in args.only:
        tables["family"] = family_table(args)
    result: dict[str, Any] = {"benchmark": "interactions", "figures": figures_of(tables)}
    result |= {**describe_machine(), "cpu_seconds": round(time.process_time() - begin)}
    if not args.quick:
        name = "interactions" if set(args.only) == set(TABLES) else f"interactions_{args.only[0]}"
        RESULTS.mkdir(exist_ok=True)
        stored = {**result, "arguments": vars(args), **tables}
        Path(RESULTS, f"{name}.json").write_text(json.dumps(stored, indent=1))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
