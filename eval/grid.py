r"""Trains and scores methods over missing patterns and seeds, and writes one table.

    python -m eval.grid --prompts none missing_aware correlated replay \
      --train complete both:0.5 both:0.7 --test complete text:0.7 image:0.7 both:0.7 \
      --seeds 0 1 2 --output runs/grid [--config RECIPE] [any flag of launch/train.py]

Each method, training pattern and seed is one training by the real program; its one model is scored
under every test pattern. The same command goes on where it stopped: finished cells are kept, failed
ones are run again; further methods, patterns and seeds are added. A method that needs flags of its
own is `--variant "NAME=--prompt replay --lock_image true"`. `--dry_run` checks everything and lists
the cells. The test split is for the final table: choose settings by the validation table.

Writes `results.json`, `report.html` and the curves as PNG into the output folder.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval import grid_plan
from eval.grid_cells import Runner, alone_in, check_runs, describe, run_program, write_json
from eval.grid_plan import Cell, GridParser, Method
from eval.grid_report import (
    align,
    comparison_table,
    pair_table,
    published_for,
    select,
    wide_table,
    write_page,
)
from eval.grid_table import MEAN_MISSING, Comparison, Records, finished, table
from eval.metrics import headline
from mm_moe.errors import ConfigError

PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "scikit-learn", "numpy")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; flags that are not the grid's own are those of every training.

    Raises:
        ConfigError: a value that cannot work.
    """
    parser = GridParser(
        prog="python -m eval.grid",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--prompts", nargs="+", default=[], metavar="NAME", help="methods: registered prompts")
    add(
        "--variant",
        action="append",
        default=[],
        metavar="NAME=FLAGS",
        help="a method with flags of its own, as one quoted word; may be repeated",
    )
    add("--train", nargs="+", required=True, metavar="PATTERN", help="complete or KIND:RATIO")
    add("--test", nargs="+", required=True, metavar="PATTERN", help="complete or KIND:RATIO")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    add("--test_seed", type=int, default=0, help="of the test masks, one for all (default: 0)")
    add("--output", type=Path, required=True, help="folder of the grid")
    add("--reference", help="method that the others are compared with (default: the first)")
    add("--resamples", type=int, default=1000, help="of the paired bootstrap (default: 1000)")
    add("--jobs", type=int, default=1, help="cells at a time (default: 1)")
    add("--launcher", default="", help='words before the training, such as "torchrun ..."')
    add("--fork", action="store_true", help="import the libraries once for all cells")
    add("--drop_models", action="store_true", help="delete a model once it is scored")
    add("--dry_run", action="store_true", help="check everything and list the cells")
    options, shared = parser.parse_known_args(argv)
    options.shared, options.words = shared, argv
    if options.jobs < 1:
        raise ConfigError(f"--jobs {options.jobs} must be at least 1.")
    if options.resamples < 1:
        raise ConfigError(f"--resamples {options.resamples} must be at least 1.")
    options.train = grid_plan.patterns_of(options.train, flag="train")
    options.test = grid_plan.patterns_of(options.test, flag="test")
    grid_plan.refuse_own_flags(options.shared, allowed=set(), where="flags of all methods")
    return options


def reference_of(methods: list[Method], name: str | None) -> str:
    """The method that the others are compared with.

    Raises:
        ConfigError: it is none of them.
    """
    names = [method.name for method in methods]
    if name is not None and name not in names:
        raise ConfigError(f"--reference {name!r} is no method; take one of {', '.join(names)}.")
    return name or names[0]


@dataclass
class Grid:
    """A checked grid.

    Attributes:
        options: the command line.
        cells: in the order in which they run.
        methods: name -> every setting of its trainings, its recipe filled in.
        digests: name -> hash of these and of the data.
        data: what all share (see `launch/check_runs.py`), with the names of the three splits.
        words: pattern -> what it means.
        reference: the method that the others are compared with.
    """

    options: argparse.Namespace
    cells: list[Cell]
    methods: dict[str, dict[str, Any]]
    digests: dict[str, str]
    data: dict[str, Any]
    words: dict[str, str]
    reference: str

    @classmethod
    def of(cls, options: argparse.Namespace) -> Grid:
        """Check everything that can be known before the first training.

        Raises:
            MMMoEError: something cannot work.
        """
        methods = grid_plan.methods_of(options.prompts, options.variant)
        reference = reference_of(methods, options.reference)
        cells = grid_plan.cells_of(methods, options.train, options.seeds)
        checked = check_runs([[*options.shared, *method.words] for method in methods])
        runs = {method.name: run for method, run in zip(methods, checked, strict=True)}
        data = grid_plan.check_same_data(runs)
        headline(data["task"])  # data without labels have nothing to score
        grid = cls(
            options,
            cells,
            {name: run["arguments"] for name, run in runs.items()},
            {name: grid_plan.method_digest(run) for name, run in runs.items()},
            data,
            grid_plan.words_of_patterns([*options.train, *options.test], data=data),
            reference,
        )
        grid_plan.check_tables(options.train, options.test, data=data, splits=grid.splits)
        return grid

    @property
    def splits(self) -> list[str]:
        """The splits that are scored: validation, where it can be, and test."""
        validation, test = self.data["validation_split"], self.data["test_split"]
        usable = validation in self.data["splits"] and validation not in self.data["unlabelled"]
        return [validation, test] if usable and validation != test else [test]

    def open_folder(self) -> None:
        """Make the output folder, or go on in it; see `eval.grid_plan.open_folder`."""
        record = {
            "methods": self.digests,
            "data": {key: self.data[key] for key in ("name", "sha256")},
            "test_seed": self.options.test_seed,
        }
        grid_plan.open_folder(self.options.output, record)

    def run(self) -> Records:
        """Run the cells that are not finished."""
        options = self.options
        runner = Runner(
            options.output,
            options.shared,
            shlex.split(options.launcher),
            options.test,
            self.splits,
            options.test_seed,
            keep_models=not options.drop_models,
            use_cpu=any(settings.get("use_cpu") for settings in self.methods.values()),
            say=lambda line: print(line, flush=True),
            fork=options.fork,
        )
        digest_of = {
            cell: cell.digest(self.digests[cell.method.name], test_seed=options.test_seed)
            for cell in self.cells
        }
        return runner.run(digest_of, jobs=options.jobs)

    def result(self, records: Records) -> dict[str, Any]:
        """The content of `results.json`: tables, comparisons, and what they were made with."""
        options, done = self.options, finished(records)
        of_test = [record["splits"][self.data["test_split"]] for record in done.values()]
        metric, metrics = headline(self.data["task"]), of_test[0]["metrics"] if of_test else []
        tables = [
            table(records, split=split, tests=options.test, metrics=metrics)
            for split in self.splits
        ]
        comparison = Comparison(options.output, self.data, options.test, metric, options.resamples)
        return {
            "command": shlex.join(["python", "-m", "eval.grid", *options.words]),
            "commits": sorted({record["commit"] for record in done.values()}),
            "versions": {
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in PACKAGES},
            },
            "machine": f"{platform.machine()}, {platform.system()}",
            "data": self.data,
            "methods": self.methods,
            "tests": options.test,
            "test_seed": options.test_seed,
            "words": self.words,
            "metric": metric,
            "metrics": metrics,
            "num_cells": len(records),
            "failed": {describe(c): r["error"] for c, r in records.items() if c not in done},
            "seconds": sum(sum(record["seconds"].values()) for record in done.values()),
            "table": [row for rows in tables for row in rows],
            "reference": self.reference,
            "resamples": options.resamples,
            "comparisons": comparison.run(records, reference=self.reference),
            "pairs": comparison.every_pair(records),
            "published": published_for(self.data, metric=metric),
        }


def announce(grid: Grid) -> None:
    """Print the patterns in words, once, and the number of cells; for a dry run the cells, too."""
    for pattern, text in grid.words.items():
        print(f"{pattern}: {text}")
    tests, number = grid.options.test, len(grid.cells)
    print(f"{number} cells, each scored on {len(tests)} test patterns ({', '.join(tests)})")
    for index, cell in enumerate(grid.cells if grid.options.dry_run else [], start=1):
        print(f"[{index}/{number}] {describe(cell)}")


def show(result: dict[str, Any]) -> None:
    """Print the headline tables of the test split, and the comparisons."""
    rows = select(result["table"], split=result["data"]["test_split"])
    for train in dict.fromkeys(row["train"] for row in rows):
        print(f"\n{result['metric']} on {result['data']['test_split']}, trained on {train}")
        print(align(wide_table(rows, train=train, metric=result["metric"])))
    if result["comparisons"]:
        print(f"\ndifference from {result['reference']}, paired bootstrap over samples, 95%")
        print(align(comparison_table(result["comparisons"])))
    if result["pairs"]:
        train = result["pairs"][0]["train"]  # over all training patterns, if there are several
        print(f"\n{MEAN_MISSING}, trained on {train}: every method against every other, 95%")
        print(align(pair_table(select(result["pairs"], train=train))))


def main(argv: list[str]) -> int:
    """Check, run what is not finished, write the results; 1 if a cell failed."""
    options = parse(argv)
    grid = Grid.of(options)
    announce(grid)
    if options.dry_run:
        return 0
    grid.open_folder()
    with alone_in(options.output):
        result = grid.result(grid.run())
        write_json(options.output / "results.json", result)
        show(result)
        print(f"\nreport: {write_page(options.output, result)}")
    for title, error in result["failed"].items():
        print(f"failed: {title}: {error}", file=sys.stderr)
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    run_program(main)
