"""Trackers beside the local files: the library's integrations, made fit for runs that resume.

A run that is killed and resumed repeats the steps behind its checkpoint, with equal numbers. Each
step shall stand once nevertheless:

- `metrics.jsonl` and `metrics.csv` drop what will be written again;
- TensorBoard keeps one folder for the run, whose reader drops it too (`purge_step`);
- a tracker that can only append gets no line that was logged before; what was logged says
  `metrics.jsonl`, which is written after the trackers: a kill between the two can double one line.

No tracker stops a training: one that fails is named once and left out from then on.
"""

from __future__ import annotations

import csv
import json
import logging
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    TensorBoardCallback,
)

from mm_moe.training.callbacks import METRICS, LineName, line_name, plain_entry

logger = logging.getLogger("mm_moe")

CSV = "csv"
CSV_FILE = "metrics.csv"
TRACKERS = "trackers.json"  # what a tracker needs to go on with the same run
TENSORBOARD, WANDB = "tensorboard", "wandb"


def last_logged(folder: Path) -> int:
    """The newest step of which `metrics.jsonl` has a whole line; -1 without any."""
    file, newest = folder / METRICS, -1
    if not file.is_file():
        return newest
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            newest = max(newest, int(json.loads(line)["step"]))
        except (ValueError, KeyError, TypeError):
            continue  # a line that a crash cut short
    return newest


class Tracker(TrainerCallback):
    """One of the library's integrations, without lines that it has already, and never fatal.

    Args:
        make: builds the integration, from the step behind which the run begins.
        name: for messages.
        folder: of the run.
        appends: whether it can only append: lines of steps that were logged are not sent again.
    """

    def __init__(
        self,
        make: Callable[[int], TrainerCallback],
        *,
        name: str,
        folder: Path,
        appends: bool = True,
    ) -> None:
        self.make, self.name, self.folder, self.appends = make, name, folder, appends
        self.logged = -1
        self.inner: TrainerCallback | None = None

    def _pass_on(self, event: str, *args: Any, **kwargs: Any) -> None:
        if self.inner is None:
            return
        try:
            getattr(self.inner, event)(*args, **kwargs)
        except Exception as error:  # a tracker may fail in its own ways; the training goes on
            logger.warning("warning: %s reports no further: %s", self.name, one_line(error))
            self.inner = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open it."""
        if not state.is_world_process_zero:
            return
        try:
            self.logged = last_logged(self.folder) if self.appends else -1
            self.inner = self.make(state.global_step)
        except Exception as error:  # as above
            logger.warning("warning: %s reports nothing: %s", self.name, one_line(error))
        self._pass_on("on_train_begin", args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Send a line that is new."""
        if state.global_step > self.logged or "train_runtime" in (kwargs.get("logs") or {}):
            self._pass_on("on_log", args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close it."""
        self._pass_on("on_train_end", args, state, control, **kwargs)


def one_line(error: Exception) -> str:
    """An error in a line, without what it quotes at length."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def trackers(names: Sequence[str], folder: Path) -> list[TrainerCallback]:
    """Callbacks for the names of `--report_to`, to stand before `MetricsFile`.

    Args:
        names: of the library's integrations, and "csv".
        folder: of the run.
    """
    return [_tracker(name, folder) for name in names]


def _tracker(name: str, folder: Path) -> TrainerCallback:
    if name == CSV:
        return MetricsCsv(folder)
    if name == TENSORBOARD:
        return Tracker(
            lambda start: _tensorboard(folder, start), name=name, folder=folder, appends=False
        )

    def make(start: int) -> TrainerCallback:
        if name == WANDB:
            _go_on_with_wandb(folder)
        return INTEGRATION_TO_CALLBACK[name]()

    return Tracker(make, name=name, folder=folder)


def _tensorboard(folder: Path, start: int) -> TrainerCallback:
    """Events in `RUN/tensorboard`; a reader drops older ones behind `start`."""
    from torch.utils.tensorboard import SummaryWriter

    place = os.environ.get("TENSORBOARD_LOGGING_DIR") or str(folder / TENSORBOARD)
    writer = SummaryWriter(log_dir=place, purge_step=start + 1 if start else None)
    return TensorBoardCallback(tb_writer=writer)


def _go_on_with_wandb(folder: Path) -> None:
    """The same id after a resume, and files below the run; the user's own settings win."""
    file = folder / TRACKERS
    try:
        name = str(json.loads(file.read_text())[WANDB])
    except (OSError, ValueError, KeyError, TypeError):
        name = secrets.token_hex(4)
        aside = file.with_suffix(".tmp")
        aside.write_text(json.dumps({WANDB: name}))
        aside.replace(file)
    os.environ.setdefault("WANDB_RUN_ID", name)
    os.environ.setdefault("WANDB_RESUME", "allow")
    os.environ.setdefault("WANDB_DIR", str(folder))


class MetricsCsv(TrainerCallback):
    """`metrics.csv`: the lines of `metrics.jsonl` as a table, empty where a line lacks a column.

    A line with the known columns is appended. New columns (scores of a validation, say) come last
    and the table is written anew beside the old one, which it then replaces.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / CSV_FILE
        self.columns: list[str] = []
        self._here: set[LineName] = set()  # as in `MetricsFile`

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep what lies before the step from which the run goes on."""
        if not state.is_world_process_zero or not self.file.exists():
            return
        rows = [row for row in self._read() if _step(row) <= state.global_step]
        self.columns = list(dict.fromkeys(key for row in rows for key in row))
        here = [row for row in rows if _step(row) == state.global_step]
        self._here = {line_name(state.global_step, row) for row in here}
        self._write(rows)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write one line."""
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        row = plain_entry(state.global_step, logs)
        if line_name(state.global_step, row) in self._here:
            return
        new = [key for key in row if key not in self.columns]
        if new or not self.file.exists():
            self.columns += new
            self._write([*self._read(), row])
            return
        with self.file.open("a", newline="", encoding="utf-8") as stream:
            csv.DictWriter(stream, self.columns).writerow(row)

    def _read(self) -> list[dict[str, str]]:
        """Whole rows with a step; one that a crash cut short is left out."""
        if not self.file.exists():
            return []
        text = self.file.read_text(encoding="utf-8", errors="replace")
        whole = text[: text.rfind("\n") + 1]
        rows = [row for row in csv.DictReader(whole.splitlines()) if _step(row) >= 0]
        return [{key: value for key, value in row.items() if key and value} for row in rows]

    def _write(self, rows: list[dict[str, Any]]) -> None:
        aside = self.file.with_suffix(".tmp")
        with aside.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, self.columns)
            writer.writeheader()
            writer.writerows(rows)
        aside.replace(self.file)


def _step(row: dict[str, Any]) -> int:
    """The step of a row; -1 if it has none."""
    try:
        return int(row["step"])
    except (KeyError, TypeError, ValueError):
        return -1
