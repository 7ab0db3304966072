"""Sensitivity and specificity at the threshold that the validation split sets.

    python launch/evaluate_run.py RUN --split validation test --predictions
    python -m eval.operating RUN

For every label the threshold is the highest at which fewer than a tenth of the validation rows with
the label fall below it; the test split is scored there. (Published code of the knee experiments
chooses the threshold on the test split, which flatters.)

N samples, C labels.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from eval.metrics import has_label
from eval.predictions import PredictionFile
from mm_moe.errors import ConfigError, DataError, MMMoEError

MAX_MISSED = 0.1  # share of the rows with a label that may fall below the threshold
SHOWN = ("sensitivity", "specificity", "balanced_accuracy")


def threshold(
    labels_N: np.ndarray, score_N: np.ndarray, *, max_missed: float = MAX_MISSED
) -> float:
    """The highest cut that misses a share < `max_missed` of the rows with the label.

    A row is called positive from the cut on.

    Raises:
        DataError: no row has the label.
    """
    positive = np.sort(score_N[labels_N.astype(bool)])
    if not len(positive):
        raise DataError("no validation row has the label, so no threshold can be set.")
    # with the k lowest positives below the threshold, k / P are missed
    missed = math.ceil(round(max_missed * len(positive), 9)) - 1
    return float(positive[max(missed, 0)])


def at_threshold(labels_N: np.ndarray, score_N: np.ndarray, cut: float) -> dict[str, float]:
    """Sensitivity, specificity and their mean; NaN where a class does not occur."""
    truth_N, called_N = labels_N.astype(bool), score_N >= cut
    sensitivity = called_N[truth_N].mean() if truth_N.any() else math.nan
    specificity = (~called_N[~truth_N]).mean() if not truth_N.all() else math.nan
    return {
        "sensitivity": float(sensitivity),
        "specificity": float(specificity),
        "balanced_accuracy": float((sensitivity + specificity) / 2),
    }


def operating_scores(
    validation: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    *,
    label_names: list[str],
) -> dict[str, dict[str, float]]:
    """Label -> threshold and test scores; a label that no validation row has is left out.

    Args:
        validation: labels (N, C) and logits (N, C); rows without a label are not counted.
        test: likewise.
        label_names: C names.

    Raises:
        ConfigError: labels or logits of another width.
    """
    for labels_NC, logits_NC in (validation, test):
        if labels_NC.shape != logits_NC.shape or labels_NC.shape[1:] != (len(label_names),):
            raise ConfigError(
                f"labels of shape {labels_NC.shape} and logits of shape {logits_NC.shape} are not "
                f"those of {len(label_names)} labels."
            )
    (v_labels, v_logits), (t_labels, t_logits) = (_labelled(*pair) for pair in (validation, test))
    found = {}
    for c, name in enumerate(label_names):
        if v_labels[:, c].any():
            cut = threshold(v_labels[:, c], v_logits[:, c])
            found[name] = {
                "threshold": cut,
                **at_threshold(t_labels[:, c], t_logits[:, c], cut),
            }
    return found


def _labelled(labels_NC: np.ndarray, logits_NC: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    kept = has_label(labels_NC)
    return labels_NC[kept], logits_NC[kept]


def score_run(run: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Condition -> label -> scores, for every condition that both prediction files hold.

    Raises:
        ConfigError: the run is no multi-label run.
        DataError: a prediction file is missing.
    """
    validation, test = (
        PredictionFile.load(run / f"predictions-{split}.npz") for split in ("validation", "test")
    )
    try:
        names = json.loads((run / "final" / "config.json").read_text())["label_names"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"{str(run)!r} has no final/config.json with label names.") from error
    return {
        condition: operating_scores(
            (validation.labels[condition], validation.logits[condition]),
            (test.labels[condition], test.logits[condition]),
            label_names=list(names or ()),
        )
        for condition in test.logits
        if condition in validation.logits
    }


def table(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """As text."""
    lines = [f"{'condition':<24}{'label':<14}" + "".join(f"{name:>19}" for name in SHOWN)]
    for condition, labels in found.items():
        for label, scores in labels.items():
            cells = "".join(f"{scores[name]:>19.3f}" for name in SHOWN)
            lines.append(f"{condition:<24}{label:<14}{cells}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Score and write `operating.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    options: Any = parser.parse_args(argv)
    try:
        found = score_run(options.run)
    except MMMoEError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    (options.run / "operating.json").write_text(json.dumps(found, indent=1))
    sys.stdout.write(f"{table(found)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
