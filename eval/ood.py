"""The mean over VQA-VS's nine test sets out of distribution, beside the one in distribution.

    python launch/evaluate_run.py RUN --split test ood_qt ...   # and the other eight
    python -m eval.ood RUN

Models are chosen on the validation split, which is in distribution. The nine sets are parts of the
first and overlap, so their scores are not independent.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from mm_moe.errors import DataError, MMMoEError

SETS = {  # what a shortcut is made of -> the sets in which it fails
    "question words": ("ood_qt", "ood_kw", "ood_kwp", "ood_qt_kw"),
    "image": ("ood_ko", "ood_kop"),
    "both": ("ood_qt_ko", "ood_kw_ko", "ood_qt_kw_ko"),
}
IN_DISTRIBUTION = "test"


def ood_means(scores: dict[str, float]) -> dict[str, float]:
    """The score in distribution, the mean of the nine, and the means of their three kinds.

    Args:
        scores: split -> score.

    Raises:
        DataError: a split is missing; all that are missing are named.
    """
    lost = [name for names in SETS.values() for name in names if name not in scores]
    lost += [] if IN_DISTRIBUTION in scores else [IN_DISTRIBUTION]
    if lost:
        raise DataError(
            f"there is no score of {', '.join(lost)}; score them with launch/evaluate_run.py RUN "
            f"--split {' '.join(lost)}."
        )
    nine = [scores[name] for names in SETS.values() for name in names]
    kinds = {kind: _mean([scores[name] for name in names]) for kind, names in SETS.items()}
    return {"in distribution": scores[IN_DISTRIBUTION], "mean of nine": _mean(nine), **kinds}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def score_run(run: Path, *, condition: str = "complete") -> dict[str, float]:
    """`ood_means` of a run's evaluations under one condition, by their first metric.

    Raises:
        DataError: an evaluation is missing, or does not know the condition.
    """
    scores = {}
    for name in (IN_DISTRIBUTION, *(name for names in SETS.values() for name in names)):
        path = run / f"evaluation-{name}.json"
        if not path.is_file():
            continue
        try:
            document = json.loads(path.read_text())
            model = next(iter(document["models"].values()))
            scores[name] = model[condition][document["metrics"][0]]
        except (ValueError, KeyError, TypeError, StopIteration) as error:
            raise DataError(f"{path} has no score of {condition!r}; score it again.") from error
    return ood_means(scores)


def main(argv: list[str] | None = None) -> int:
    """Print the means."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--condition", default="complete", help="a missing condition")
    options: Any = parser.parse_args(argv)
    try:
        found = score_run(options.run, condition=options.condition)
    except MMMoEError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write("".join(f"{name:<18}{100 * v:6.2f}\n" for name, v in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
