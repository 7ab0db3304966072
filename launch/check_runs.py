"""Checks the flags of runs without starting one: `python launch/check_runs.py < RUNS.json`.

Reads a JSON list of command lines of `launch/train.py` (each a list of words), refuses what
`launch/train.py` would refuse before training, and prints one JSON object: what each run's settings
are with its recipe filled in, and what its data are. `python -m eval.grid` asks it before the first
of many trainings.
"""

from __future__ import annotations

import copy
import json
import sys
from typing import Any

from launch.cli import ProgramParser, RecipeParser, run_program
from launch.tables import read_tables
from mm_moe.data.schema import DataSource
from mm_moe.errors import ConfigError

DATA_FLAGS = (  # what decides on the data that a run sees
    *("dataset", "data_dir", "dataset_options", "train_split"),
    *("interaction_table", "interaction_subset", "reject_class", "interaction_target"),
)


def describe_data(source: DataSource) -> dict[str, Any]:
    """What a table about a data set has to know of it."""
    return {
        "name": source.name,
        "sha256": source.fingerprint(),
        "license": source.license,
        "modalities": list(source.modalities),
        "label_names": list(source.label_names),
        "problem_type": source.problem_type,
        "task": source.task or source.problem_type,
        "splits": {split: source.size(split) for split in source.splits()},
        "unlabelled": dict(source.unlabelled),
    }


def check_run(argv: list[str], known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The settings and data of one run.

    Args:
        argv: its command line.
        known: data that were described before, by their settings; grows.

    Raises:
        MMMoEError: `launch/train.py` would refuse the run.
    """
    from launch import run  # brings DeepSpeed in: not before the flags have been read

    values = RecipeParser().namespace(argv)
    plain = copy.deepcopy(vars(values))
    source = run.check(values, argv)
    plain["deepspeed"] = values.deepspeed  # its content, not its path
    del plain["hub_token"]
    key = json.dumps([plain[name] for name in DATA_FLAGS])
    if key not in known:
        known[key] = describe_data(source)
    tables = read_tables(values.missing_table, source=source)
    plain["missing_table"] = {split: table.table_hash() for split, table in tables.items()}
    return {"arguments": plain, "data": {**known[key], "tables": plain["missing_table"]}}


def main(argv: list[str]) -> int:
    """Read, check, print."""
    ProgramParser(description=__doc__).parse_args(argv)
    try:
        runs = json.load(sys.stdin)
        words = [word for run in runs for word in run]
    except (ValueError, TypeError) as error:
        raise ConfigError(f"standard input is no JSON list of command lines ({error}).") from error
    if not all(isinstance(word, str) for word in words):
        raise ConfigError("standard input is no JSON list of lists of words.")
    known: dict[str, dict[str, Any]] = {}
    print(json.dumps({"runs": [check_run(run, known) for run in runs]}, default=str))
    return 0


if __name__ == "__main__":
    run_program(main)
