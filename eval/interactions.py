r"""Trains, fuses and scores interaction experts, from a table of categories to a report.

    python launch/prepare_data.py interactions --dataset NAME --output TABLE_DIR
    python -m eval.interactions --interaction_table TABLE_DIR/interactions.parquet \
      --seeds 0 1 2 --output runs/experts [--config RECIPE] [any flag of launch/train.py]

For each seed: a baseline on all training rows; one expert per category that goes on from it; a
fuser that learns the categories; and further baselines, until the ensemble of baselines has as many
models as the fused answer. Each is a training by the real program. Fusion rules that are fitted are
fitted on the validation split; the test split is scored once, at the end.

The same command goes on where it stopped: finished trainings are kept. `--dry_run` checks
everything and lists the trainings. Writes `results.json` and `report.html`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval import grid_plan, interactions_plan
from eval.grid_cells import DONE, Runner, alone_in, check_runs, describe, run_program, write_json
from eval.grid_plan import Cell, GridParser
from eval.interaction_fusion import DEFAULT_TAU
from eval.interaction_report import text, write_page
from eval.interaction_runs import Fused, fuse_runs
from eval.interactions_plan import Plan
from finetune.interaction_view import found_categories
from mm_moe.data.interactions.table import InteractionTable
from mm_moe.errors import ConfigError, DataError

PACKAGES = ("torch", "deepspeed", "transformers", "datasets", "scikit-learn", "numpy")
MEANT_FOR_ALL = {"prompt", "prompt_config"}


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line; flags that are not the driver's own are those of every training.

    Raises:
        ConfigError: a value that cannot work.
    """
    parser = GridParser(
        prog="python -m eval.interactions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--interaction_table", type=Path, required=True, help="categories of all splits")
    add("--output", type=Path, required=True, help="folder of the trainings")
    add("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    add("--reject_class", action="store_true", help="experts see all rows, with a class more")
    add("--expert_flags", default="", help="flags of the experts' trainings, as one quoted word")
    add("--fuser_flags", default="", help="flags of the fuser's training, as one quoted word")
    add("--ensemble", type=int, help="baselines in the ensemble (default: experts + 1)")
    add("--train", default="complete", metavar="PATTERN", help="complete or KIND:RATIO")
    add("--test", default="complete", metavar="PATTERN", help="complete or KIND:RATIO")
    add("--test_seed", type=int, default=0, help="of the test mask (default: 0)")
    add("--tau", type=float, default=DEFAULT_TAU, help=f"of the cascade (default: {DEFAULT_TAU})")
    add("--resamples", type=int, default=1000, help="of the paired bootstrap (default: 1000)")
    add("--jobs", type=int, default=1, help="trainings at a time (default: 1)")
    add("--launcher", default="", help='words before the training, such as "torchrun ..."')
    add("--dry_run", action="store_true", help="check everything and list the trainings")
    options, shared = parser.parse_known_args(argv)
    options.shared, options.words = shared, argv
    for flag, low in (("jobs", 1), ("resamples", 1), ("ensemble", 1)):
        value = getattr(options, flag)
        if value is not None and value < low:
            raise ConfigError(f"--{flag} {value} must be at least {low}.")
    if not 0 <= options.tau <= 1:
        raise ConfigError(f"--tau {options.tau} must lie in [0, 1]: it is a probability.")
    options.train = grid_plan.patterns_of([options.train], flag="train")[0]
    options.test = grid_plan.patterns_of([options.test], flag="test")[0]
    for name in ("expert_flags", "fuser_flags"):
        setattr(options, name, _split(getattr(options, name), name))
    for words, where in (
        (options.shared, "flags of all trainings"),
        (options.expert_flags, "--expert_flags"),
        (options.fuser_flags, "--fuser_flags"),
    ):
        interactions_plan.refuse_own_flags(words, where=where)
        grid_plan.refuse_own_flags(words, allowed=MEANT_FOR_ALL, where=where)
    return options


def _split(text: str, flag: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"--{flag} {text!r}: {error}.") from error


@dataclass
class Driver:
    """A checked set of trainings.

    Attributes:
        options: the command line.
        plan: what is trained.
        table: the categories.
        runs: name of a method -> its settings, recipe filled in, and its data.
    """

    options: argparse.Namespace
    plan: Plan
    table: InteractionTable
    runs: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, options: argparse.Namespace) -> Driver:
        """Check everything that can be known before the first training.

        Raises:
            MMMoEError: something cannot work.
        """
        seeds = interactions_plan.check_seeds(options.seeds)
        table = InteractionTable.load(options.interaction_table)
        (baseline,) = check_runs([options.shared])
        there = found_categories(table, split=baseline["arguments"]["train_split"])
        if len(there) < 2:
            raise DataError(
                f"the training rows of {str(options.interaction_table)!r} have the categories "
                f"{', '.join(there) or 'of none'}; experts need two."
            )
        plan = Plan(
            table=options.interaction_table,
            categories=tuple(there),
            seeds=seeds,
            train=options.train,
            reject=options.reject_class,
            num_members=options.ensemble or len(there) + 1,
            expert_words=tuple(options.expert_flags),
            fuser_words=tuple(options.fuser_flags),
        )
        others = plan.kinds[1:]
        words = [[*options.shared, *cell.method.words] for cell in others]
        runs = {cell.method.name: run for cell, run in zip(others, check_runs(words), strict=True)}
        driver = cls(options, plan, table, {interactions_plan.BASELINE: baseline, **runs})
        driver.check_table()
        assert driver.words  # a pattern that does not fit the data is refused now
        return driver

    @property
    def words(self) -> dict[str, str]:
        """What the missing patterns mean."""
        patterns = [self.options.train, self.options.test]
        return grid_plan.words_of_patterns(patterns, data=self.data)

    @property
    def data(self) -> dict[str, Any]:
        """What is known of the data, and the names of the three splits."""
        run = self.runs[interactions_plan.BASELINE]
        names = ("train_split", "validation_split", "test_split")
        return {**run["data"], **{name: run["arguments"][name] for name in names}}

    @property
    def splits(self) -> list[str]:
        """The splits that are scored: validation, where it can be, and test."""
        data = self.data
        validation, test = data["validation_split"], data["test_split"]
        usable = validation in data["splits"] and validation not in data["unlabelled"]
        return [validation, test] if usable and validation != test else [test]

    def check_table(self) -> None:
        """Refuse a table without the splits that fuser and oracle are scored on.

        Raises:
            DataError: names them.
        """
        for split in self.splits:
            if not len(self.table.rows_of(split)):
                raise DataError(
                    f"the interaction table {str(self.plan.table)!r} has no row of split "
                    f"{split!r}; make it for all splits."
                )

    def run(self) -> dict[Cell, dict[str, Any]]:
        """Run what is not finished: all baselines, then what starts from them."""
        options, plan = self.options, self.plan
        runner = Runner(
            options.output,
            options.shared,
            shlex.split(options.launcher),
            [options.test],
            self.splits,
            options.test_seed,
            keep_models=True,
            use_cpu=bool(self.runs[interactions_plan.BASELINE]["arguments"].get("use_cpu")),
            say=lambda line: print(line, flush=True),
        )
        baselines = list(dict.fromkeys(c for seed in plan.seeds for c in plan.members(seed)))
        records = runner.run(self._digests(baselines), jobs=options.jobs)
        later = [
            cell
            for seed in plan.seeds
            if records[plan.baseline(seed)]["status"] == DONE
            for cell in self.second_stage(seed)
        ]
        return records | runner.run(self._digests(later), jobs=options.jobs)

    def second_stage(self, seed: int) -> list[Cell]:
        """The experts of a seed, which start from its baseline, and its fuser."""
        folder = self.options.output / "cells" / self.plan.baseline(seed).folder_name
        start = folder / "run" / "final"
        experts = [self.plan.expert(name, seed, start=start) for name in self.plan.categories]
        return [*experts, self.plan.fuser(seed)]

    def _digests(self, cells: Sequence[Cell]) -> dict[Cell, str]:
        return interactions_plan.digests(
            self.plan, cells, self.runs, test_seed=self.options.test_seed
        )

    def open_folder(self) -> None:
        """Make the output folder, or go on in it; see `eval.grid_plan.open_folder`."""
        digests = {cell.method.name: of for cell, of in self._digests(self.plan.kinds).items()}
        record = {
            "methods": digests,
            "data": {key: self.data[key] for key in ("name", "sha256")},
            "test_seed": self.options.test_seed,
        }
        grid_plan.open_folder(self.options.output, record)

    def result(self, records: Mapping[Cell, Mapping[str, Any]]) -> dict[str, Any]:
        """The content of `results.json`.

        Raises:
            DataError: no seed has all its models.
        """
        options, plan = self.options, self.plan
        whole = [
            seed
            for seed in plan.seeds
            if all(
                cell in records and records[cell]["status"] == DONE
                for cell in (*plan.members(seed), *self.second_stage(seed))
            )
        ]
        failed = {describe(c): r["error"] for c, r in records.items() if r["status"] != DONE}
        if not whole:
            raise DataError(f"no seed has all its models; {next(iter(failed.items()))}")
        fused = Fused(
            options.output, plan, self.table, self.data, self.splits, options.test, options.tau
        )
        section = fuse_runs(fused, whole, num_resamples=options.resamples)
        return {
            "title": f"Interaction experts on {self.data['name']}",
            "about": self._about(),
            "command": shlex.join(["python", "-m", "eval.interactions", *options.words]),
            "commits": sorted({record["commit"] for record in records.values()}),
            "versions": {
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in PACKAGES},
            },
            "machine": f"{platform.machine()}, {platform.system()}",
            "data": self.data,
            "table": {"sha256": plan.table_digest(), "origin": dict(self.table.origin)},
            "seeds": whole,
            "failed": failed,
            "num_trainings": len(records),
            "seconds": round(sum(sum(r["seconds"].values()) for r in records.values()), 1),
            "sections": [section],
        }

    def _about(self) -> list[str]:
        data, plan = self.data, self.plan
        kind = "all rows with a reject class" if plan.reject else "the rows of its category alone"
        return [
            f"One expert for each of {', '.join(plan.categories)}, each trained on {kind} from the "
            f"baseline's weights, and a fuser with the categories as classes; the ensemble is "
            f"{plan.num_members} baselines of other seeds, as many models as experts and fuser.",
            f"Scored on split {data['test_split']}, {self.words[self.options.test]}; "
            f"data sha256 {data['sha256']}, {data['license']}.",
        ]


def announce(driver: Driver) -> None:
    """Print what is to be trained."""
    plan = driver.plan
    cells = [cell for seed in plan.seeds for cell in plan.members(seed)]
    cells += [cell for seed in plan.seeds for cell in driver.second_stage(seed)]
    rows = driver.table.rows_of(driver.data["train_split"])
    print(
        f"{len(cells)} trainings: {len(plan.seeds)} seeds of {plan.num_members} baselines, "
        f"{len(plan.categories)} experts ({', '.join(plan.categories)}) and a fuser; "
        f"{len(rows)} training rows have a category or none"
    )
    for cell in cells if driver.options.dry_run else []:
        print(describe(cell))


def main(argv: list[str]) -> int:
    """Check, run what is not finished, fuse, write; 1 if a training failed."""
    options = parse(argv)
    driver = Driver.of(options)
    announce(driver)
    if options.dry_run:
        return 0
    driver.open_folder()
    with alone_in(options.output):
        result = driver.result(driver.run())
        write_json(options.output / "results.json", result)
        print()
        print(text(result["sections"][0]))
        print(f"\nreport: {write_page(options.output / 'report.html', result)}")
    for title, error in result["failed"].items():
        print(f"failed: {title}: {error}", file=sys.stderr)
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    run_program(main)
