"""What a data set lacks: `python launch/prepare_data.py missingness --dataset NAME --output DIR`.

For each split: how many rows lack each modality by nature, what a missing protocol takes besides,
the patterns, and whether a missing modality goes with the label (phi, Cramér's V or the
point-biserial correlation, with a p-value). `DIR` gets missingness.json, .html and .png; no row,
id or value is in them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from eval.missingness_report import PAGE, PICTURE, write_page
from launch.cli import ProgramParser
from mm_moe.arguments import parse_json
from mm_moe.data.missing import MissingProtocol
from mm_moe.data.missingness import report
from mm_moe.data.schema import DataSource
from mm_moe.errors import ConfigError
from mm_moe.registry import DATASETS

NUMBERS = "missingness.json"


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    flags = ProgramParser(prog="prepare_data.py missingness", description=__doc__)
    flags.add_argument("--dataset", required=True, help="a registered data set")
    flags.add_argument("--data_dir", help="folder of the data set's files")
    flags.add_argument("--dataset_options", help="JSON object with the data set's own options")
    flags.add_argument("--output", type=Path, required=True, help="folder to write")
    flags.add_argument("--splits", nargs="+", help="default: all")
    flags.add_argument("--missing_type", default="none", help="as in training")
    flags.add_argument("--missing_ratio", type=float, default=0.0, help="as in training")
    flags.add_argument("--missing_seed", type=int, default=0, help="as in training")
    flags.add_argument(
        "--min_count", type=int, default=5, help="patterns of fewer rows are counted together"
    )
    options = flags.parse_args(argv)
    if options.min_count < 1:
        raise ConfigError(f"--min_count {options.min_count} must be at least 1.")
    for name in (NUMBERS, PAGE, PICTURE):
        if (options.output / name).exists():
            raise ConfigError(
                f"--output {str(options.output)!r} holds {name} already; name another."
            )
    return options


def open_data(options: argparse.Namespace) -> DataSource:
    """The data set.

    Raises:
        ConfigError: an option that it does not have.
    """
    own = parse_json("dataset_options", options.dataset_options)
    try:
        source: DataSource = DATASETS.resolve(options.dataset)(options.data_dir, **own)
    except TypeError as error:
        raise ConfigError(f"--dataset_options for {options.dataset!r}: {error}.") from error
    return source


def measure(source: DataSource, options: argparse.Namespace) -> dict[str, Any]:
    """The report of all splits."""
    splits: dict[str, Any] = {}
    for split in options.splits or source.splits():
        protocol = MissingProtocol(
            dataset=source.name,
            split=source.check_split(split),
            kind=options.missing_type,
            ratio=options.missing_ratio,
            seed=options.missing_seed,
        )
        words = protocol.describe(source.modalities)
        splits[split] = report(source, split, missing=protocol, least=options.min_count)
    return {
        "dataset": source.name,
        "modalities": list(source.modalities),
        "protocol": words,
        "min_count": options.min_count,
        "splits": splits,
    }


def main(argv: list[str]) -> int:
    """Count, write, tell."""
    options = parse(argv)
    source = open_data(options)
    document = measure(source, options)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / NUMBERS).write_text(json.dumps(document, indent=1), encoding="utf-8")
    write_page(document, options.output)
    for split, found in document["splits"].items():
        lacking = [
            f"{name} {100 * cell['rate']:.1f}%"
            + (f" + {100 * found['imposed'][name]['rate']:.1f}%" if options.missing_ratio else "")
            for name, cell in found["natural"].items()
        ]
        print(f"{split}: {found['rows']:,} rows lack {', '.join(lacking)}")
    print(f"written to {options.output}")
    return 0
