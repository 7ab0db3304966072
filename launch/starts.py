"""A start of a run: compared with the one before it, written into `run.json`, and its end too."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.assemble import Run
from launch.checks import check_same_model
from launch.cli import find_recipe, read_recipe
from launch.drift import Facts, compare, settle_drift
from launch.finish import run_record
from launch.manifest import (
    earlier_starts,
    new_start,
    note_end,
    plain_flags,
    read_manifest,
    run_id,
    settings_without_secrets,
    write_manifest,
)
from mm_moe.checkpoint import store
from mm_moe.errors import MMMoEError
from mm_moe.training import runtime

UNKNOWN_END = "killed, or its end was not written"


@dataclass
class Start:
    """One start of a run.

    Attributes:
        argv: its command line, the run's own flags included.
        flags: recipe and flags before anything is filled in.
        recipe: name, hash and flags of the recipe.
        resume: the checkpoint it goes on from, if any.
        allow_drift: whether settings that move the curve may differ.
        report_to: trackers beside `metrics.jsonl`.
    """

    argv: list[str]
    flags: dict[str, Any]
    recipe: dict[str, Any]
    resume: Path | None = None
    allow_drift: bool = False
    report_to: list[str] = field(default_factory=list)
    _record: dict[str, Any] = field(default_factory=dict)
    _changed: list[str] = field(default_factory=list)
    _written: bool = False

    @classmethod
    def of(
        cls, values: argparse.Namespace, argv: list[str], *, recipe: dict[str, Any] | None
    ) -> Start:
        """From flags to which nothing was added yet.

        Args:
            values: recipe and flags.
            argv: the command line.
            recipe: flags of the recipe, where they come from a run's `run.json`.
        """
        kept: dict[str, Any] = {"name": values.config}
        if recipe is None:
            text = find_recipe(values.config).read_bytes()
            kept["sha256"] = hashlib.sha256(text).hexdigest()
            recipe = read_recipe(values.config)
        kept["flags"] = settings_without_secrets(recipe)
        return cls(argv, plain_flags(values), kept, allow_drift=bool(values.allow_drift))

    @property
    def step(self) -> int:
        """The step from which the run goes on."""
        if self.resume is None:
            return 0
        return int(json.loads((self.resume / store.MANIFEST).read_text())["step"])

    def check(self, run: Run) -> None:
        """Compare with the run that is resumed. A collective; rank 0 reads and speaks.

        Raises:
            CheckpointError: on every rank; the model is another one, settings differ that must
                not, or `run.json` is damaged.
        """
        if self.resume is not None:
            check_same_model(self.resume, run.model.config.to_dict())
        error: MMMoEError | None = None
        if runtime.is_main():
            folder = Path(str(run.settings.training.output_dir))
            self._record = {
                **run_record(run, folder, self.argv),
                "recipe": self.recipe,
                "flags": self.flags,
            }
            try:
                known = run_id(folder) if self.resume is not None else None
                self._record["id"] = known or uuid.uuid4().hex
                self._compare()
            except MMMoEError as found:
                error = found
        error = runtime.agree(error)
        if error is not None:
            raise error

    def _compare(self) -> None:
        if self.resume is None:
            return
        before = read_manifest(self.resume.resolve().parent)
        if before is None:
            return
        drift = compare(Facts.of(before), Facts.of(self._record), step=self.step)
        told = settle_drift(drift, run=self.resume.parent, allowed=self.allow_drift)
        self._changed = drift.all
        for line in told:
            print(line, flush=True)

    @property
    def run_id(self) -> str | None:
        """Of the run, on rank 0."""
        return self._record.get("id")

    def write(self, folder: Path) -> None:
        """Write `run.json` with this start behind the earlier ones; rank 0 calls it."""
        starts = earlier_starts(folder)
        start = new_start(
            step=self.step,
            world_size=self._record["world_size"],
            ep_size=self._record["ep_size"],
            changed=self._changed,
        )
        if starts:
            start["previous"] = (starts[-1].get("ended") or {}).get("how", UNKNOWN_END)
        write_manifest(folder, {**self._record, "starts": [*starts, start]})
        self._written = True

    @contextlib.contextmanager
    def ends(self, folder: Path) -> Iterator[None]:
        """Around the run: how it ended, in words that quote no data."""
        how = "done"
        try:
            yield
        except MMMoEError as error:
            how = f"status {error.exit_code} ({type(error).__name__})"
            raise
        except KeyboardInterrupt:
            how = "interrupted"
            raise
        except BaseException as error:
            how = f"failed ({type(error).__name__})"
            raise
        finally:
            if self._written:  # by rank 0, and not by a start that was refused
                note_end(folder, how)
