"""What a grid is made of: methods x training patterns x seeds, each trained once; and its folder.

A cell is one training; every test pattern is scored from its one model. Cells are known by a hash
of all their settings, so a folder can be gone on with, extended, and not mixed with another grid.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from eval.patterns import COMPLETE, TABLE, parse_pattern, pattern_name
from mm_moe.data.missing import MissingProtocol
from mm_moe.errors import ConfigError

GRID_FILE = "grid.json"
# Flags of launch/train.py that a grid sets by itself, and how to say them to the grid.
SET_BY_THE_GRID = {
    "prompt": "--prompts",
    "prompt_config": "--variant 'NAME=--prompt P --prompt_config {...}'",
    "missing_type": "--train",
    "missing_ratio": "--train",
    "seed": "--seeds",
    "missing_seed": "--seeds (training masks) and --test_seed (test masks)",
    "output_dir": "--output",
    "compare_with": "--prompts",
    "resume_from_checkpoint": "the same command again, which goes on",
    "final_evaluation": "--test",
    "hub_token": "nothing is pushed",
    "push_to_hub": "launch/export.py afterwards",
}
# What says where or how a run is kept, and not what it computes.
WITHOUT_EFFECT = frozenset(
    [
        *(name for name in SET_BY_THE_GRID if name not in ("prompt", "prompt_config")),
        *("config", "data_dir", "logging_dir", "logging_steps", "run_name", "report_to"),
        *("hub_model_id", "hub_private_repo", "local_rank", "disable_tqdm"),
        *("save_strategy", "save_steps", "save_total_limit"),
    ]
)


class GridParser(argparse.ArgumentParser):
    """Complains with a `ConfigError` instead of a usage page."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line."""
        raise ConfigError(f"{message}; --help lists the flags.")


@dataclass(frozen=True)
class Method:
    """A way to train: a name for the table, and its own flags of `launch/train.py`."""

    name: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """One training: a method, a missing pattern of the training split, and a seed."""

    method: Method
    train: str
    seed: int

    @property
    def folder_name(self) -> str:
        """A name for a folder, readable and unique within a grid."""
        return f"{self.method.name}__{self.train.replace(':', '-')}__seed-{self.seed}"

    def train_words(self, shared: Sequence[str]) -> list[str]:
        """The flags of `launch/train.py` for this cell, without its output folder.

        The seed moves weights, order and training masks. Test masks have a seed of their own, the
        same for all cells, so that all are scored on the same rows lacking the same things.
        """
        kind, ratio = parse_pattern(self.train)
        words = ["--save_strategy", "no", *shared, *self.method.words]
        if kind != TABLE:
            words += ["--missing_type", kind, "--missing_ratio", f"{ratio:g}"]
        words += ["--seed", str(self.seed), "--missing_seed", str(self.seed)]
        return [*words, "--final_evaluation", "false"]

    def digest(self, method_digest: str, *, test_seed: int) -> str:
        """Hash of everything that the cell's numbers depend on."""
        return digest([method_digest, self.train, self.seed, test_seed])


def digest(value: Any) -> str:
    """sha256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def methods_of(prompts: Sequence[str], variants: Sequence[str]) -> list[Method]:
    """The methods in the order of the table.

    Args:
        prompts: registered prompts, each with the options that it has by itself or in the recipe.
        variants: NAME=FLAGS, the flags quoted as for a shell.

    Raises:
        ConfigError: no method, a name twice, or one that cannot name a folder.
    """
    methods = [Method(prompt, ("--prompt", prompt)) for prompt in prompts]
    for variant in variants:
        name, equals, text = variant.partition("=")
        if not equals or name.startswith("-"):
            raise ConfigError(
                f"--variant {variant!r} has no name; write --variant 'NAME=--prompt replay ...'."
            )
        try:
            methods.append(Method(name, tuple(shlex.split(text))))
        except ValueError as error:
            raise ConfigError(f"--variant {name!r}: {error} in {text!r}.") from error
    names = [method.name for method in methods]
    if not methods:
        raise ConfigError(
            "the grid has no method; give --prompts NAME ... or --variant NAME=FLAGS."
        )
    for name in names:
        if not name.replace("-", "").replace("_", "").replace(".", "").replace("+", "").isalnum():
            raise ConfigError(f"method {name!r} must be letters, digits, and - _ . + only.")
        if names.count(name) > 1:
            raise ConfigError(f"method {name!r} is there twice; give each its own name.")
    allowed = {"prompt", "prompt_config"}
    for method in methods:
        refuse_own_flags(method.words, allowed=allowed, where=f"--variant {method.name}")
    return methods


def refuse_own_flags(words: Sequence[str], *, allowed: set[str], where: str) -> None:
    """Refuse flags of a training that the grid sets.

    Raises:
        ConfigError: names the flag and what to say instead.
    """
    for word in words:
        name = word[2:].split("=")[0].replace("-", "_") if word.startswith("--") else ""
        if name in SET_BY_THE_GRID and name not in allowed:
            raise ConfigError(
                f"{where}: the grid sets --{name} itself; instead: {SET_BY_THE_GRID[name]}."
            )


def patterns_of(texts: Sequence[str], *, flag: str) -> list[str]:
    """Patterns in their one form, each once and in order.

    Raises:
        ConfigError: a pattern is malformed.
    """
    try:
        return list(dict.fromkeys(pattern_name(*parse_pattern(text)) for text in texts))
    except ConfigError as error:
        raise ConfigError(f"--{flag}: {error}") from error


def cells_of(methods: Sequence[Method], trains: Sequence[str], seeds: Sequence[int]) -> list[Cell]:
    """All cells, seeds outermost: a grid that is stopped early has every method with fewer seeds.

    Raises:
        ConfigError: a seed is there twice or negative.
    """
    for seed in seeds:
        if seed < 0 or list(seeds).count(seed) > 1:
            raise ConfigError(f"seed {seed} must not be negative, and stand there once.")
    product = itertools.product(seeds, trains, methods)
    return [Cell(method, train, seed) for seed, train, method in product]


def words_of_patterns(patterns: Sequence[str], *, data: Mapping[str, Any]) -> dict[str, str]:
    """Each pattern in words, after checking that it fits the data.

    Raises:
        ConfigError: a kind that the data do not have.
    """
    words = {}
    for pattern in dict.fromkeys(patterns):
        kind, ratio = parse_pattern(pattern)
        if kind == TABLE:
            words[pattern] = "what the stored table of the split says"
            continue
        protocol = MissingProtocol(kind=kind, ratio=ratio, dataset=data["name"], split="test")
        try:
            words[pattern] = protocol.describe(data["modalities"])
        except ConfigError as error:
            raise ConfigError(f"pattern {pattern!r}: {error}") from error
    return words


def method_digest(run: Mapping[str, Any]) -> str:
    """Hash of a method: its settings with the recipe filled in, and the content of its data."""
    kept = {k: v for k, v in run["arguments"].items() if k not in WITHOUT_EFFECT}
    return digest([kept, run["data"]["sha256"]])


def check_same_data(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The data that all methods share.

    Raises:
        ConfigError: two methods have different data or splits: their scores cannot be compared.
    """
    first, *others = runs
    keys = ("train_split", "validation_split", "test_split")
    for name in others:
        same = runs[name]["data"] == runs[first]["data"] and all(
            runs[name]["arguments"][key] == runs[first]["arguments"][key] for key in keys
        )
        if not same:
            raise ConfigError(
                f"methods {first!r} and {name!r} do not have the same data and splits."
            )
    return {**runs[first]["data"], **{key: runs[first]["arguments"][key] for key in keys}}


def check_tables(
    trains: Sequence[str], tests: Sequence[str], *, data: Mapping[str, Any], splits: Sequence[str]
) -> None:
    """Check that the pattern "table" stands where stored tables are given, and only there.

    Args:
        trains: training patterns.
        tests: test patterns.
        data: what `check_same_data` gives.
        splits: splits that are scored.

    Raises:
        ConfigError: a split without its table, or a training pattern beside the training table.
    """
    train_split = data["train_split"]
    wanted = [train_split] * (TABLE in trains) + [*splits] * (TABLE in tests)
    for split in wanted:
        if split not in data["tables"]:
            raise ConfigError(
                f"the pattern {TABLE!r} needs a stored table of the split {split!r}; name one with "
                f"--missing_table {split}=FILE (or score one split only: --validation_split test)."
            )
    if train_split in data["tables"] and list(trains) != [TABLE]:
        raise ConfigError(
            f"--missing_table says what is missing in the split {train_split!r}, so that --train "
            f"can only be {TABLE}, not {', '.join(trains)}; drop one."
        )


def open_folder(folder: Path, record: Mapping[str, Any]) -> None:
    """Make the grid's folder, or go on in it where it is the same grid.

    Args:
        folder: of the grid.
        record: {"methods": name -> digest, "data": name and hash, "test_seed"}. Methods that an
            earlier call named stay on record.

    Raises:
        ConfigError: the folder holds something else, or another grid.
    """
    path = folder / GRID_FILE
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output {str(folder)!r} is a file; name a folder.")
    known: dict[str, str] = {}
    if path.is_file():
        known = _same_grid(folder, record)
    elif folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"--output {str(folder)!r} holds files that are no grid; name another.")
    folder.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps({**record, "methods": {**known, **record["methods"]}}, indent=1))
    aside.replace(path)


def _same_grid(folder: Path, record: Mapping[str, Any]) -> dict[str, str]:
    """The methods on record in a folder that can be gone on with."""
    another = f"--output {str(folder)!r} is the folder of another grid: "
    out = "; name another folder."
    try:
        stored = json.loads((folder / GRID_FILE).read_text())
        known = dict(stored["methods"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder / GRID_FILE} is damaged ({error}){out}") from error
    for key in ("data", "test_seed"):
        if stored.get(key) != record[key]:
            raise ConfigError(f"{another}{key} was {stored.get(key)!r}, is {record[key]!r}{out}")
    for name, now in record["methods"].items():
        if known.get(name, now) != now:
            raise ConfigError(f"{another}method {name!r} had other settings{out}")
    return known


def by_kind(patterns: Sequence[str]) -> dict[str, list[str]]:
    """Missing kind -> its patterns by rising ratio, the complete one first where it is scored."""
    start = [pattern for pattern in patterns if pattern == COMPLETE]
    kinds: dict[str, list[str]] = {}
    for pattern in patterns:
        if pattern not in (COMPLETE, TABLE):  # a table has no rate
            kinds.setdefault(parse_pattern(pattern)[0], list(start)).append(pattern)
    return {kind: sorted(row, key=lambda p: parse_pattern(p)[1]) for kind, row in kinds.items()}
