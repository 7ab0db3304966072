"""Interaction categories: `python launch/prepare_data.py interactions --dataset NAME --output DIR`.

What each modality alone predicts comes from one of these (`--labeller`):
  own           heads on the frozen features of `--backbone`, K-fold cross-fitted over train
  transformers  a model in a local folder: `--model DIR` (texts), `--image_model DIR` (images)
  endpoint      chat completions at `--url URL` with `--served_model NAME`; the key is read from the
                environment variable `--key_variable`
  files         published score files: `--published DIR`, or `--labels image=FILE text=FILE`

Writes `OUTPUT/interactions.parquet` (for `--interaction_table`) and `OUTPUT/report.json`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from launch import label_by_files, label_by_model, label_by_own
from launch.cli import ProgramParser
from mm_moe.arguments import dataset_options
from mm_moe.batch import Sample
from mm_moe.data.interactions.build import CALIBRATED, STORED, Judging, build_table, describe
from mm_moe.data.interactions.cross_fit import FOLDS
from mm_moe.data.interactions.export import check_exportable, export_published
from mm_moe.data.interactions.hard_labels import UniScores
from mm_moe.data.interactions.table import InteractionTable
from mm_moe.data.schema import SINGLE_LABEL, DataSource
from mm_moe.errors import ConfigError
from mm_moe.registry import DATASETS, nearest

TABLE, REPORT = "interactions.parquet", "report.json"

Samples = Mapping[str, list[Sample]]
Scores = dict[str, dict[str, UniScores]]  # modality -> split -> scores
Stored = dict[str, dict[str, np.ndarray]]  # likewise, predictions
Labeller = Callable[
    [argparse.Namespace, DataSource, Samples], tuple[Scores, Stored | None, dict[str, Any]]
]
LABELLERS: Mapping[str, Labeller] = {
    "own": label_by_own.label,
    "transformers": label_by_model.label_by_folder,
    "endpoint": label_by_model.label_by_endpoint,
    "files": label_by_files.label,
}


def parser() -> ProgramParser:
    """The flags."""
    flags = ProgramParser(
        prog="prepare_data.py interactions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = flags.add_argument
    add("--dataset", required=True, help="a registered data set with classes")
    add("--data_dir", help="folder of its files")
    add("--dataset_options", help="JSON object with its own options")
    add("--output", type=Path, required=True, help="folder to write")
    add("--overwrite", action="store_true", help="replace an earlier table there")
    add("--splits", nargs="+", help="splits to categorise (default: all that have labels)")
    add("--labeller", default="own", help=f"one of {', '.join(LABELLERS)}")
    add("--mode", help="calibrated (default), paper, paper_for_fuser, or stored (files' default)")
    add("--min_gap", type=float, help="leave rows out whose answers are no further apart")
    add("--balance", type=float, help="lowest share of either answer in train (two classes)")
    add("--write_published", action="store_true", help="also write the published JSON layout")
    add("--raw", type=Path, help="published raw tables, whose records that layout then holds")
    add("--batch_size", type=int, default=32)
    add("--use_cpu", action="store_true", help="even where there is a GPU")
    label_by_own.add_flags(flags.add_argument_group("own"), folds=FOLDS)
    label_by_model.add_flags(flags.add_argument_group("transformers and endpoint"))
    label_by_files.add_flags(flags.add_argument_group("files"))
    return flags


def check_output(output: Path, *, overwrite: bool) -> None:
    """Refuse to write over something else.

    Raises:
        ConfigError: the folder holds a table, or other things.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / TABLE).is_file() and not (output / label_by_model.ANSWERS).is_dir():
        raise ConfigError(
            f"--output {str(output)!r} holds something that is no interaction table; name a new "
            "folder."
        )
    if (output / TABLE).is_file() and not overwrite:
        raise ConfigError(
            f"--output {str(output)!r} holds an interaction table already; name a new folder or "
            "replace it with --overwrite."
        )


def open_source(options: argparse.Namespace) -> DataSource:
    """The data set.

    Raises:
        ConfigError: it has no classes, fewer than two modalities, or options that do not fit.
    """
    try:
        kind = DATASETS.resolve(options.dataset)
        source: DataSource = kind(options.data_dir, **dataset_options(vars(options)))
    except TypeError as error:
        raise ConfigError(f"--dataset_options for {options.dataset!r}: {error}.") from error
    if source.problem_type != SINGLE_LABEL:
        raise ConfigError(
            f"data set {source.name!r} is a {source.problem_type}; categories need one class for "
            "each sample."
        )
    if len(source.modalities) < 2 and options.labeller != "files":
        raise ConfigError(
            f"data set {source.name!r} has {', '.join(source.modalities)} alone; categories need "
            "two modalities or more."
        )
    return source


def read_samples(source: DataSource, splits: list[str] | None) -> dict[str, list[Sample]]:
    """Split -> ids, groups and labels of its rows, the training split first."""
    chosen = splits or [name for name in source.splits() if name not in source.unlabelled]
    return {split: list(source.index(source.check_split(split))) for split in chosen}


def print_report(about: dict[str, Any]) -> None:
    """Counts and shares, a line for each split and modality."""
    share = "positive" if about["classes"] == 2 else "of its largest class"
    for split, record in about["splits"].items():
        accuracy = ", ".join(
            f"{name} alone {'-' if value is None else f'{value:.1%}'}"
            for name, value in record["accuracy"].items()
        )
        print(
            f"{split}: {record['rows']:,} rows, largest class {record['majority_label']:.1%}, "
            f"{accuracy}; {record['without_category']:,} without category"
        )
        for name, category in record["categories"].items():
            positive = category["positive"]
            end = "" if positive is None else f", {positive:.1%} {share}"
            print(f"  {name:<10} {category['rows']:>7,} {category['share']:>6.1%}{end}")
    for warning in about["warnings"]:
        print(f"note: {warning}")


def write(table: InteractionTable, about: dict[str, Any], options: argparse.Namespace) -> None:
    """Write table and report."""
    options.output.mkdir(parents=True, exist_ok=True)
    table.save(options.output / TABLE)
    (options.output / REPORT).write_text(json.dumps(about, indent=1), encoding="utf-8")


def main(argv: list[str]) -> int:
    """Check, label, categorise, tell."""
    options = parser().parse_args(argv)
    if options.labeller not in LABELLERS:
        known = nearest(options.labeller, list(LABELLERS))
        raise ConfigError(f"--labeller {options.labeller!r} is unknown; {known}")
    if options.batch_size < 1:
        raise ConfigError(f"--batch_size {options.batch_size} must be at least 1.")
    default = STORED if options.labeller == "files" else CALIBRATED
    judging = Judging(options.mode or default, options.min_gap, options.balance)
    if judging.mode == STORED and options.labeller != "files":
        raise ConfigError(f"--mode {STORED} is for --labeller files; take {CALIBRATED}.")
    if options.raw and not options.write_published:
        raise ConfigError("--raw is for the published layout; add --write_published.")
    check_output(options.output, overwrite=options.overwrite)
    source = open_source(options)
    samples = read_samples(source, options.splits)
    if options.write_published and options.labeller != "files":
        check_exportable(
            source, modalities=source.modalities, splits=list(samples), raw=options.raw
        )
    scores, stored, origin = LABELLERS[options.labeller](options, source, samples)
    table = build_table(
        samples,
        scores,
        dataset=source.name,
        label_names=source.label_names,
        judging=judging,
        stored=stored,
        origin={"labeller": options.labeller, "data": source.fingerprint(), **origin},
    )
    about = describe(table)
    if options.write_published:  # the files name modalities of their own
        check_exportable(source, modalities=table.modalities, splits=list(samples), raw=options.raw)
    write(table, about, options)
    if options.write_published:
        export_published(table, scores, source, folder=options.output, raw=options.raw)
    print_report(about)
    print(f"written to {options.output / TABLE}; train with --interaction_table of that file")
    return 0
