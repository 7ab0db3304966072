"""Scores a published model: `python launch/evaluate_run.py RUN [--split test]`, in one process.

Reads `RUN/final` (or a checkpoint of the run) without DeepSpeed, and writes
`RUN/evaluation-SPLIT.json`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from eval.patterns import scores_document
from eval.report import format_table
from launch.cli import ProgramParser, run_program
from launch.scoring import Scorer, train_prior
from mm_moe.arguments import dataset_options
from mm_moe.checkpoint import store
from mm_moe.errors import CheckpointError, ConfigError
from mm_moe.models.modeling import MultimodalMoEModel
from mm_moe.models.processing import processors_for
from mm_moe.registry import DATASETS


def read_run(folder: Path) -> dict[str, Any]:
    """The arguments of a run.

    Raises:
        CheckpointError: the folder is no run.
    """
    try:
        return json.loads((folder / "run.json").read_text())["arguments"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{str(folder)!r} is no run: it has no readable run.json; name a folder that "
            "launch/train.py wrote."
        ) from error


def main(argv: list[str]) -> int:
    """Load, score, print, write."""
    parser = ProgramParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a folder that launch/train.py wrote")
    parser.add_argument("--split", help="split to score (default: the run's test split)")
    parser.add_argument("--checkpoint", help="checkpoint-N or latest, instead of final/")
    parser.add_argument("--data_dir", help="folder of the data, where it has moved")
    parser.add_argument("--batch_size", type=int, default=128)
    options = parser.parse_args(argv)
    if options.batch_size < 1:
        raise ConfigError(f"--batch_size {options.batch_size} must be at least 1.")
    saved = read_run(options.run)
    split = options.split or saved["test_split"]
    folder = options.run / "final"
    if options.checkpoint:
        wanted = options.checkpoint
        folder = store.find(
            options.run, wanted if wanted == "latest" else str(options.run / wanted)
        )
    elif not (folder / store.WEIGHTS).is_file():
        raise CheckpointError(f"{str(options.run)!r} has no final/; take --checkpoint latest.")
    source = DATASETS.resolve(saved["dataset"])(
        options.data_dir or saved["data_dir"],
        **dataset_options(saved),
    )
    if source.problem_type == "none":
        raise ConfigError(f"data set {source.name!r} has no labels to score against.")
    if source.check_split(split) in source.unlabelled:
        raise ConfigError(f"split {split!r} cannot be scored: {source.unlabelled[split]}.")
    model = MultimodalMoEModel.from_pretrained(folder)
    scorer = Scorer(
        model,
        source,
        processors_for(model.config, source=str(folder)),
        batch_size=options.batch_size,
        max_bad_samples=saved["max_bad_samples"],
    )
    rows = scorer.score(
        prior=train_prior(source, saved["train_split"]),
        split=split,
        ratio=saved["missing_ratio"],
        seed=saved["missing_seed"],
    )
    document = scores_document({model.config.prompt: rows})
    target = options.run / f"evaluation-{split}.json"
    target.write_text(json.dumps(document, indent=1))
    print(format_table(document))
    print(f"written to {target}")
    return 0


if __name__ == "__main__":
    run_program(main)
