"""Raw downloads to checked Parquet: `python launch/prepare_data.py NAME --source DIR --output DIR`.

Afterwards `--dataset NAME --data_dir DIR` streams it. Bad rows (no label, a missing file, an image
that does not decode, NaN, ...) are counted, named and listed in `DIR/quarantine.jsonl`.

Clinical data (adni, mimic3, mimic4, eicu, ...) come under pseudonyms: shards, quarantine and all
that a run writes from them name nobody. `DIR/ids.csv` translates, for its owner only.

`prepare_data.py interactions` and `features` make something of a data set instead,
`fastmri_slices` makes slices of volumes, `cells` Parquet of single cells, and `missingness` tells
what a data set lacks; see their --help.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from launch.cli import ProgramParser, run_program
from mm_moe.arguments import parse_json
from mm_moe.data.prepare.options import check_options
from mm_moe.data.prepare.write import QUARANTINE, check_target, prepare
from mm_moe.registry import RAW_DATASETS

PROGRAMS = {  # imported when asked for: they are heavy
    "interactions": "launch.prepare_interactions",
    "features": "launch.cache_features",
    "fastmri_slices": "launch.prepare_slices",
    "cells": "launch.prepare_cells",
    "missingness": "launch.missingness",
}


def parser() -> ProgramParser:
    """The flags."""
    flags = ProgramParser(description=__doc__)
    flags.add_argument("name", help=f"one of {', '.join(sorted([*RAW_DATASETS, *PROGRAMS]))}")
    flags.add_argument("--source", type=Path, required=True, help="folder of the download")
    flags.add_argument("--output", type=Path, required=True, help="folder to write")
    flags.add_argument("--workers", type=int, default=1, help="processes that check images")
    flags.add_argument(
        "--max_bad_ratio", type=float, default=0.01, help="share of a split that may be bad"
    )
    flags.add_argument("--overwrite", action="store_true", help="replace an earlier output")
    flags.add_argument("--options", help='JSON object for the data set, such as {"per": "movie"}')
    return flags


def report(info: dict[str, Any], output: Path) -> None:
    """Say what was written and what was not."""
    for split, record in info["splits"].items():
        lacking = [f"{n:,} without {name}" for name, n in record["missing"].items() if n]
        mended = [f"{n:,} values mended ({what})" for what, n in record["repairs"].items()]
        parts = [f"{record['rows']:,} rows", *lacking, *mended]
        if record["quarantined"]:
            why = ", ".join(f"{n:,} {reason}" for reason, n in record["reasons"].items())
            parts.append(f"{record['quarantined']:,} in quarantine: {why}")
        print(f"{split}: {'; '.join(parts)}")
    for what, found in info["findings"].items():
        if found and not (isinstance(found, dict) and "columns" in found):
            print(f"{what}: {_told(found)}")
    for split, why in info["unlabelled"].items():
        print(f"{split} cannot be scored: {why}")
    if any(record["quarantined"] for record in info["splits"].values()):
        print(f"the rows in quarantine are named in {output / QUARANTINE}")
    print(f"written to {output}; stream it with --dataset {info['name']} --data_dir {output}")


def _told(found: Any) -> str:
    """A count, a list of names, or lists by name, as words."""
    if isinstance(found, dict):
        return "; ".join(f"{name}: {_told(one)}" for name, one in found.items())
    return ", ".join(map(str, found)) if isinstance(found, list) else str(found)


def main(argv: list[str]) -> int:
    """Check, write, tell; or hand over to another program."""
    if argv and argv[0] in PROGRAMS:
        program = importlib.import_module(PROGRAMS[argv[0]])
        return program.main(argv[1:])
    options = parser().parse_args(argv)
    adapter = RAW_DATASETS.resolve(options.name)
    own = parse_json("options", options.options)
    check_target(options.output, overwrite=options.overwrite)
    check_options(adapter, own, name=options.name)
    raw = adapter(options.source, **own)
    info = prepare(
        raw,
        output=options.output,
        workers=options.workers,
        max_bad_ratio=options.max_bad_ratio,
        overwrite=options.overwrite,
    )
    report(info, options.output)
    return 0


if __name__ == "__main__":
    run_program(main)
