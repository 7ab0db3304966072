"""The clinical benchmark: resampled areas, learning rates by validation, merged tables."""

import json

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from eval.benchmarks import clinical
from eval.predictions import PredictionFile


def test_the_area_counts_rows_by_their_weights_and_ties_half():
    labels, score = np.array([0, 1, 0, 1]), np.array([0.1, 0.4, 0.4, 0.9])
    # pairs: (1, 0) above, (1, 2) a tie, (3, 0) and (3, 2) above: 3.5 of 4
    weights = np.array([[1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 2, 0], [1, 0, 1, 0]])
    area = clinical.auroc_of(labels, score, weights)
    assert area.tolist() == [3.5 / 4, 1.0, 0.5, 0.5]  # the last has no row of class 1


def test_the_area_is_that_of_scikit_learn_on_the_resampled_rows():
    generator = np.random.default_rng(0)
    labels, score = generator.integers(0, 2, 50), generator.integers(0, 9, 50) / 9
    rows = generator.integers(0, 50, 50)
    weights = np.bincount(rows, minlength=50)[None]
    expected = roc_auc_score(labels[rows], score[rows])
    assert clinical.auroc_of(labels, score, weights)[0] == pytest.approx(expected)


def row(method, test, mean, *, split="test", metric="auroc"):
    about = {"method": method, "test": test, "mean": mean, "split": split, "metric": metric}
    return {**about, "chance": 0.5, "values": [mean]}


def test_validation_alone_takes_the_learning_rate():
    table = [
        *(row("zero-0.001", test, 0.6, split="validation") for test in clinical.TESTS),
        *(row("zero-0.0003", test, 0.7, split="validation") for test in clinical.TESTS),
        *(row("zero-0.001", test, 0.9) for test in clinical.TESTS),
        row("zero-0.001", "complete", 0.99, split="validation", metric="auprc"),
    ]
    validated = clinical.best_rates({"table": table})
    assert validated == {"zero": {"0.001": pytest.approx(0.6), "0.0003": pytest.approx(0.7)}}
    assert clinical.chosen_of(validated) == {"zero": "0.0003"}


def test_runs_are_merged_and_methods_are_paired_by_patient(tmp_path, monkeypatch):
    runs = [({"fold": fold}, fold) for fold in range(2)]
    monkeypatch.setitem(clinical.SETS, "toy", {"runs": runs})
    rates = {"zero": "0.001", "retriever": "0.0003", "similar_retriever": "0.001"}
    labels, right = np.array([0, 1] * 4), np.array([0.0, 1.0] * 4)
    for fold in range(2):
        folder = tmp_path / f"toy-{fold}"
        table = [row(f"zero-{rate}", "complete", float(rate) + fold) for rate in ("0.001", "0.1")]
        for method, rate in rates.items():
            run = folder / "cells" / f"{method}-{rate}__subset-0.5__seed-{fold}" / "run"
            run.mkdir(parents=True)
            score = 1 - right if method == "zero" else right
            logits = {t: np.stack([-score, score], 1).astype(np.float32) for t in clinical.TESTS}
            ids = np.array([f"{n}" for n in range(8)])
            found = dict.fromkeys(clinical.TESTS, labels)
            PredictionFile(ids, ids, found, logits).save(run / "predictions-test.npz")
        (folder / "results.json").write_text(json.dumps({"table": table}))
    [merged] = clinical.table_of("toy", rates, tmp_path, count=2)
    assert (merged["test"], merged["mean"]) == ("natural", pytest.approx(0.501))
    pairs = clinical.pairs_of(clinical.resampled_runs("toy", rates, tmp_path, count=2))
    found = {(p["method"], p["other"], p["test"]): p["difference"] for p in pairs}
    assert found["retriever", "zero", "natural"] == 1.0
    assert found["similar_retriever", "retriever", clinical.MISSING] == 0.0
