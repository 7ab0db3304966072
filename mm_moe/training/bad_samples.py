"""Undecodable samples of a run, over all ranks, loader workers and resumes; and when to stop.

`bad_samples.jsonl` in the run's folder has one line for each: {"id", "reason", "step"}. The step is
that at which the ranks told each other, so that a resume keeps what its checkpoint has seen and
meets the rest again: no sample counts twice.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from mm_moe.errors import DataError
from mm_moe.training import runtime

BAD_SAMPLES = "bad_samples.jsonl"
FLOOR = 1000  # samples that a share is taken of at least: one bad picture of four says nothing
SHOWN = 10


class BadSamples(TrainerCallback):
    """Gathers what the ranks could not decode, writes it down, and ends the run over a limit.

    Args:
        folder: of the run.
        found: id -> reason, what this rank has met; it grows while the run goes on.
        max_samples: how many are borne.
        max_share: which share of the samples is borne; 0: any.
        size: samples of the split, if known.
        samples_seen: samples that the run has consumed, over all ranks and epochs.
    """

    def __init__(
        self,
        folder: Path,
        *,
        found: Mapping[str, str],
        max_samples: int,
        max_share: float,
        size: int | None,
        samples_seen: Callable[[], int],
    ) -> None:
        self.file = folder / BAD_SAMPLES
        self.found, self.size, self.samples_seen = found, size, samples_seen
        self.max_samples, self.max_share = max_samples, max_share
        self.known: dict[str, str] = {}  # id -> reason, the same on all ranks

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        """Keep what was known at the step from which the run goes on."""
        kept = self._read(state.global_step) if runtime.is_main() else []
        kept = runtime.agree(kept)
        self.known = {entry["id"]: entry["reason"] for entry in kept}
        if runtime.is_main() and self.file.exists():
            aside = self.file.with_suffix(".tmp")
            aside.write_text("".join(map(_line, kept)))
            aside.replace(self.file)

    def on_step_end(self, args, state, control, **kwargs: Any) -> None:
        """Now and then, and before each checkpoint."""
        if state.global_step % max(1, min(int(args.logging_steps), 50)) == 0 or control.should_save:
            self.gather(state.global_step)

    def on_save(self, args, state, control, **kwargs: Any) -> None:
        """For a checkpoint that was decided on late."""
        self.gather(state.global_step)

    def on_train_end(self, args, state, control, **kwargs: Any) -> None:
        """What came after the last log."""
        self.gather(state.global_step)

    def gather(self, step: int) -> None:
        """Tell each other and write it down. A collective.

        Raises:
            DataError: over a limit, on every rank.
        """
        news = {name: why for name, why in self.found.items() if name not in self.known}
        fresh: dict[str, str] = {}
        for told in runtime.gather_objects(news):
            fresh = {**told, **fresh}
        if not fresh:
            return
        self.known |= fresh
        if runtime.is_main():
            with self.file.open("a") as stream:
                for name in sorted(fresh):
                    stream.write(_line({"id": name, "reason": fresh[name], "step": step}))
        self._check()

    def _check(self) -> None:
        count, seen = len(self.known), max(self.samples_seen(), FLOOR)
        share = count / (seen if self.size is None else min(seen, self.size))
        over = f"max_bad_samples ({self.max_samples})" if count > self.max_samples else None
        if self.max_share and share > self.max_share:
            over = over or f"max_bad_share ({self.max_share:g}), a share of {share:.3g}"
        if over:
            first = ", ".join(f"{name!r} ({why})" for name, why in list(self.known.items())[:SHOWN])
            more = f" and {count - SHOWN} more" if count > SHOWN else ""
            raise DataError(
                f"{count} samples have an image that does not decode, over the limit of {over}: "
                f"{first}{more}; all are in {self.file}. Mend the data or raise the limit."
            )

    def _read(self, step: int) -> list[dict[str, Any]]:
        """The entries of the file up to a step; lines that a crash cut short are left out."""
        kept: dict[str, dict[str, Any]] = {}
        for line in self.file.read_text().splitlines() if self.file.exists() else []:
            try:
                entry = json.loads(line)
                if entry["step"] <= step:
                    kept.setdefault(entry["id"], entry | {"reason": str(entry["reason"])})
            except (ValueError, KeyError, TypeError):
                continue
        return list(kept.values())


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry) + "\n"
