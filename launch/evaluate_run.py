"""Scores a published model: `python launch/evaluate_run.py RUN [--split test]`, in one process.

Reads `RUN/final` (or a checkpoint of the run) without DeepSpeed, and writes
`RUN/evaluation-SPLIT.json`. Other test conditions than the usual ones:

    python launch/evaluate_run.py RUN --split validation test --patterns complete text:0.7 both:0.5

A run without task labels (contrastive pretraining) gets zero-shot scores instead: retrieval between
images and texts, and classes by their names; `zero_shot-SPLIT.json` and `.csv` with the columns of
`clip-benchmark`.

`--rescore DIR [--dataset mustard urfunny mmsd]` instead of a run scores the published logits of
interaction experts under every fusion rule (see `launch/rescore.py`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from eval.patterns import chosen_conditions, scores_document
from eval.predictions import PredictionFile
from eval.report import format_table
from finetune.interaction_view import view_of
from launch import rescore
from launch.cli import ProgramParser, run_program, tell
from launch.scoring import Scorer, train_prior
from launch.supports import supports_of
from launch.tables import read_tables
from launch.zero_shot import (
    as_objective_sees,
    has_pairs,
    scored_split,
    write_rows,
    zero_shot_of,
)
from mm_moe.arguments import dataset_options, parse_json
from mm_moe.checkpoint import store
from mm_moe.data.missing import MissingProtocol
from mm_moe.data.schema import NO_LABEL, DataSource
from mm_moe.data.support_batch import Supports
from mm_moe.data.table import MissingTable
from mm_moe.errors import CheckpointError, ConfigError
from mm_moe.models.folder import load_model
from mm_moe.models.processing import processors_for
from mm_moe.models.shards import has_weights
from mm_moe.registry import DATASETS
from mm_moe.training.predict import Predictions


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


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = ProgramParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a folder that launch/train.py wrote")
    parser.add_argument("--split", nargs="+", help="splits to score (default: the run's test one)")
    parser.add_argument("--checkpoint", help="checkpoint-N or latest, instead of final/")
    parser.add_argument("--data_dir", help="folder of the data, where it has moved")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument(
        "--patterns",
        nargs="+",
        help="test conditions: complete, KIND:RATIO or table (default: complete, each modality "
        "missing, mixed, and a stored table)",
    )
    parser.add_argument(
        "--missing_table",
        nargs="+",
        help="stored tables, FILE or SPLIT=FILE, for the condition table (default: the run's)",
    )
    parser.add_argument("--mask_seed", type=int, help="of the test masks (default: the run's)")
    parser.add_argument(
        "--resamples", type=int, default=500, help="of the bootstrap intervals; 0: no intervals"
    )
    parser.add_argument(
        "--predictions", action="store_true", help="also write predictions-SPLIT.npz, ids hashed"
    )
    parser.add_argument("--zero_shot_dataset", help="labelled images to classify by class names")
    parser.add_argument("--zero_shot_data_dir", help="folder of that data set's files")
    parser.add_argument("--zero_shot_templates", help="file of prompt templates, {} for the class")
    parser.add_argument("--use_cpu", action="store_true", help="even where there is a GPU")
    options = parser.parse_args(argv)
    if options.batch_size < 1:
        raise ConfigError(f"--batch_size {options.batch_size} must be at least 1.")
    if options.resamples < 0:
        raise ConfigError(f"--resamples {options.resamples} must not be negative; 0 leaves it out.")
    return options


def find_model(run: Path, checkpoint: str | None) -> Path:
    """The folder of the weights.

    Raises:
        CheckpointError: they are not there, or damaged.
    """
    if checkpoint:
        wanted = checkpoint if checkpoint == "latest" else str(run / checkpoint)
        return store.find(run, wanted, tell=tell)
    if not has_weights(run / "final"):
        raise CheckpointError(f"{str(run)!r} has no final/; take --checkpoint latest.")
    return run / "final"


def open_data(saved: dict[str, Any], options: argparse.Namespace) -> DataSource:
    """The data set of a run, with the splits that are asked for.

    Raises:
        ConfigError: nothing to score against.
        DataError: an unknown split, or data that are not in order.
    """
    source: DataSource = DATASETS.resolve(saved["dataset"])(
        options.data_dir or saved["data_dir"], **dataset_options(saved)
    )
    source = as_objective_sees(view_of(source, saved), saved.get("objective", "supervised"))
    if source.problem_type == NO_LABEL and not has_pairs(source):
        raise ConfigError(f"data set {source.name!r} has no labels to score against.")
    if not options.split and has_pairs(source):
        options.split = [scored_split(source, saved["test_split"], saved["validation_split"])]
    options.split = options.split or [saved["test_split"]]
    for split in options.split:
        if source.check_split(split) in source.unlabelled:
            raise ConfigError(f"split {split!r} cannot be scored: {source.unlabelled[split]}.")
    return source


def stored_tables(
    saved: dict[str, Any], options: argparse.Namespace, source: DataSource
) -> dict[str, MissingTable]:
    """The stored tables of the splits that are scored, after checking the conditions.

    Raises:
        ConfigError: a condition that does not fit.
        DataError: a table that cannot be read or does not fit.
    """
    words = options.missing_table or saved.get("missing_table") or []
    tables = read_tables(words, source=source, only=options.split)
    for split in options.split:
        chosen_conditions(
            options.patterns or [],
            modalities=source.modalities,
            dataset=source.name,
            split=split,
            stored=tables.get(split),
        )
    return tables


def training_supports(saved: dict[str, Any], source: DataSource, run: Path) -> Supports | None:
    """The training rows that a fill asks for, as the run drew them; None without such a fill."""
    split = saved["train_split"]
    table = None
    if saved.get("fill"):
        table = read_tables(saved.get("missing_table") or [], source=source, only=[split]).get(
            split
        )
    protocol = MissingProtocol(
        kind=saved["missing_type"],
        ratio=saved["missing_ratio"],
        seed=saved["missing_seed"],
        dataset=source.name,
        split=split,
    )
    return supports_of(
        saved.get("fill"),
        parse_json("fill_config", saved.get("fill_config")),
        source,
        split=split,
        missing=table or protocol,
        seed=draw_seed(saved),
        folder=run,
        source_options=dataset_options(saved),
    )


def draw_seed(saved: dict[str, Any]) -> int:
    """The seed of a run's draws; `TrainingArguments` writes down what is None as a text."""
    seed = saved.get("data_seed")
    return saved["seed"] if seed in (None, "None") else seed


def score_zero_shot(scorer: Scorer, saved: dict[str, Any], options: argparse.Namespace) -> None:
    """Retrieval and zero-shot classes of a model that was trained without task labels."""
    asked = {key: value for key, value in vars(options).items() if key.startswith("zero_shot")}
    zero_shot = zero_shot_of(
        saved | {key: value for key, value in asked.items() if value is not None},
        scorer.source,
        model=scorer.model,
        processors=scorer.processors,
        batch_size=options.batch_size,
    )
    for split in options.split:
        rows = zero_shot.rows(split)
        write_rows(rows, options.run, split=split, pretrained=str(saved.get("pretrained")))


def main(argv: list[str]) -> int:
    """Load, score, print, write."""
    if rescore.asked_for(argv):
        return rescore.main(argv)
    options = parse(argv)
    saved = read_run(options.run)
    folder = find_model(options.run, options.checkpoint)
    source = open_data(saved, options)
    tables = stored_tables(saved, options, source)
    model = load_model(folder)
    if torch.cuda.is_available() and not options.use_cpu:
        torch.nn.Module.to(model, "cuda")
    scorer = Scorer(
        model,
        source,
        processors_for(model.config, source=str(folder)),
        batch_size=options.batch_size,
        max_bad_samples=saved["max_bad_samples"],
        tables=tables,
        supports=training_supports(saved, source, options.run),
    )
    if has_pairs(source):
        score_zero_shot(scorer, saved, options)
        return 0
    prior = train_prior(source, saved["train_split"])
    for split in options.split:
        found: dict[str, Predictions] = {}
        rows = scorer.score(
            prior=prior,
            split=split,
            ratio=saved["missing_ratio"],
            seed=saved["missing_seed"] if options.mask_seed is None else options.mask_seed,
            patterns=options.patterns,
            num_resamples=options.resamples,
            keep=found.__setitem__ if options.predictions else None,
        )
        if options.predictions:
            group_of = {sample.id: sample.group_key for sample in source.index(split)}
            file = PredictionFile.of(found, group_of=group_of, dataset=source.name)
            file.save(options.run / f"predictions-{split}.npz")
        document = scores_document({model.config.prompt: rows})
        target = options.run / f"evaluation-{split}.json"
        target.write_text(json.dumps(document, indent=1))
        print(format_table(document))
        print(f"written to {target}")
    return 0


if __name__ == "__main__":
    run_program(main)
