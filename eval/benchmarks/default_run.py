"""The default run over several seeds: replay prompts against the same model without prompts.

    python -m eval.benchmarks.default_run              # three seeds, about ten minutes on 2 cores
    python -m eval.benchmarks.default_run --quick      # one seed of a few steps: does it run?

Each seed is one run of the real program (`launch/train.py` with its default recipe); the seed moves
weights, order and training masks. Scores are those of the test split, which chose nothing: the
recipe was set on the validation split. The last line is one JSON object; its figures are points of
accuracy averaged over the conditions in which something is missing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from eval.benchmarks.moe_layer import RESULTS, describe_machine
from eval.patterns import COMPLETE

PROGRAM = Path(__file__).parents[2] / "launch" / "train.py"
METRIC = "accuracy"


def run_seed(seed: int, folder: Path, more: list[str]) -> dict[str, Any]:
    """Run the program once and return its `scores.json`, with the seconds that it took."""
    begin = time.monotonic()
    output = folder / f"seed-{seed}"
    words = [sys.executable, str(PROGRAM), "--output_dir", str(output)]
    words += ["--seed", str(seed), "--missing_seed", str(seed), *more]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return {**json.loads((output / "scores.json").read_text()), "seconds": time.monotonic() - begin}


def table(results: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Condition -> model -> mean and standard deviation over the seeds, in percent."""
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for condition in results[0]["conditions"]:
        rows[condition] = {
            model: _spread([r["models"][model][condition][METRIC] for r in results])
            for model in results[0]["models"]
        }
        rows[condition]["chance"] = _spread(
            [max(level[METRIC] for level in r["chance"][condition].values()) for r in results]
        )
    return rows


def _spread(values: list[float]) -> dict[str, float]:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": 100 * statistics.fmean(values), "std": 100 * deviation}


def mean_of_missing(scores: dict[str, Any], model: str) -> float:
    """Accuracy in percent, averaged over the conditions in which something is missing."""
    conditions = [name for name in scores["conditions"] if name != COMPLETE]
    return 100 * statistics.fmean(scores["models"][model][name][METRIC] for name in conditions)


def main() -> None:
    """Run, print, store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="one seed, a few steps; not stored")
    options = parser.parse_args()
    seeds = options.seeds[:1] if options.quick else options.seeds
    more = ["--max_steps", "10"] if options.quick else []
    with tempfile.TemporaryDirectory() as folder:
        results = [run_seed(seed, Path(folder), more) for seed in seeds]
    rows = table(results)
    models = list(results[0]["models"])
    for condition, cells in rows.items():
        shown = "  ".join(
            f"{name} {cell['mean']:.1f} +- {cell['std']:.1f}" for name, cell in cells.items()
        )
        print(f"{condition:16} {shown}")
    gains = [mean_of_missing(r, models[0]) - mean_of_missing(r, models[1]) for r in results]
    result = {
        "benchmark": "default_run",
        "figures": {
            "gain_of_prompts_when_missing_points": statistics.fmean(gains),
            "gain_std_points": statistics.stdev(gains) if len(gains) > 1 else 0.0,
            "seconds": statistics.fmean(r["seconds"] for r in results),
        },
        "seeds": seeds,
        "command": "python -m eval.benchmarks.default_run --seeds " + " ".join(map(str, seeds)),
        "table": rows,
        "gains_by_seed": gains,
        **describe_machine(),
    }
    if not options.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "default_run.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: result[k] for k in ("benchmark", "figures", "machine", "commit")}))


if __name__ == "__main__":
    main()
