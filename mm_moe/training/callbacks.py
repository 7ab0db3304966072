"""What a run says while it runs: one progress line, and `metrics.jsonl` with each step once."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback

METRICS = "metrics.jsonl"
LineName = tuple[int, frozenset[str]]
SHOWN: dict[str, tuple[str, Callable[[float], str]]] = {  # of a log line, on the progress line
    "loss": ("loss", "{:.3f}".format),
    "learning_rate": ("lr", "{:.1e}".format),
    "perf/samples_per_second": ("samples/s", "{:.0f}".format),
    "perf/mfu": ("mfu", "{:.0%}".format),
    "perf/matmul_share": ("of matmul", "{:.0%}".format),
    "perf/data_wait_share": ("wait", "{:.0%}".format),
    "perf/memory_gb": ("GB", "{:.1f}".format),
    "moe/load_imbalance": ("load", "{:.2f}x".format),
}


class MetricsFile(TrainerCallback):
    """Appends every log to `metrics.jsonl`; on resume, drops the steps that will be run again."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / METRICS
        self._here: set[LineName] = set()  # of lines at the step of the resume

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        """Truncate behind the step from which the run goes on; a new start leaves nothing."""
        if not state.is_world_process_zero or not self.file.exists():
            return
        if not state.global_step:  # even step 0 has a line, that of a score before training
            self.file.unlink()
            return
        kept = []
        for line in self.file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                entry = json.loads(line)
                step = int(entry["step"])
            except (ValueError, KeyError, TypeError):
                continue  # a line that a crash cut short
            if step <= state.global_step:
                kept.append(line)
            if step == state.global_step:
                self._here.add(line_name(step, entry))
        aside = self.file.with_suffix(".tmp")
        aside.write_text("".join(f"{line}\n" for line in kept))
        aside.replace(self.file)

    def on_log(self, args, state, control, logs: dict[str, float] | None = None, **kwargs: Any):
        """Write one line."""
        if state.is_world_process_zero and logs and "train_runtime" not in logs:
            entry = plain_entry(state.global_step, logs)
            if line_name(state.global_step, entry) in self._here:
                return  # `--eval_on_start` of a resumed run: this line is there
            with self.file.open("a") as stream:
                stream.write(json.dumps(entry) + "\n")

    def on_save(self, args, state, control, **kwargs: Any) -> None:
        """Bring to the disk what a run that goes on from this checkpoint keeps."""
        if state.is_world_process_zero and self.file.exists():
            with self.file.open("rb") as stream:
                os.fsync(stream.fileno())


def line_name(step: int, entry: Iterable[str]) -> LineName:
    """What tells two lines apart: their step and columns."""
    return step, frozenset(entry)


def plain_entry(step: int, logs: Mapping[str, Any]) -> dict[str, Any]:
    """A log line as JSON has it, its step first."""
    return {"step": step, **{key: _number(value) for key, value in logs.items()}}


def _number(value: Any) -> Any:
    """JSON has no NaN: a number that is not finite becomes its name."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class Progress(TrainerCallback):
    """One progress line on rank 0: the step, and `SHOWN` of the newest log line."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        """Open the bar where the run starts or resumes."""
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc=self.title,
                unit="step",
                dynamic_ncols=True,
                mininterval=0.5,
            )

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        """Advance."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs: dict[str, float] | None = None, **kwargs: Any):
        """Show the newest figures."""
        if self.bar is None or not logs or "loss" not in logs:
            return
        shown = {name: form(logs[key]) for key, (name, form) in SHOWN.items() if key in logs}
        self.bar.set_postfix(shown, refresh=False)

    def on_train_end(self, args, state, control, **kwargs: Any) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class EpochOfStream(TrainerCallback):
    """Keeps `state.epoch` right for an endless stream, also after a resume."""

    def __init__(self, samples_per_epoch: int | None, samples_per_step: int) -> None:
        self.samples_per_epoch = samples_per_epoch
        self.samples_per_step = samples_per_step

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        """Derive the epoch from the steps; of data of unknown size, the share of the run."""
        samples, size = state.global_step * self.samples_per_step, self.samples_per_epoch
        state.epoch = samples / size if size else state.global_step / max(state.max_steps, 1)
