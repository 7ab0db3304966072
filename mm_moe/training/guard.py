"""Skips optimizer steps whose numbers are bad, on all ranks alike, and counts them.

Between the backward of a step's last micro-batch and the optimizer, every rank adds up one vector
of six numbers over all ranks: losses, gradient norm, and which signals came in. All ranks decide by
the sum, so they decide alike. A skipped step changes no weight, no moment, no step count of the
optimizer, no router bias and no batch-norm statistic; the learning-rate schedule goes on, since it
is a function of the step's number, and random numbers that were drawn stay drawn.

DeepSpeed 0.19.8 by itself: ZeRO 1 and 2 skip a step without a finite norm without a word, and then
the schedule waits; ZeRO 0 has no such check and writes NaN into every weight.
"""

from __future__ import annotations

import json
import logging
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mm_moe.errors import BadNumbersError
from mm_moe.training import runtime
from mm_moe.training.guard_hooks import keep_statistics, nonfinite_gradients, put_before_optimizer
from mm_moe.training.preemption import SIGNALS, StopSignals, strongest
from mm_moe.training.spikes import SpikeWindow

REPORT = "bad_numbers.json"
MAX_ENTRIES = 100  # skipped steps that the report keeps
MAX_IDS = 64  # samples of one rank and step that it names
MAX_GRADIENTS = 20  # tensors of one step that it names

logger = logging.getLogger("mm_moe")


@dataclass(frozen=True)
class SkippedStep:
    """What is known of a step that was not taken. Numbers are as JSON holds them.

    Attributes:
        step: its number, from 1.
        reason: why, in words.
        loss: mean over all ranks and micro-batches.
        norm: of all gradients before clipping.
        losses: of each rank.
        ids: rank by rank, the first samples of its micro-batches.
        gradients: the first parameters whose gradient is not finite, with the experts.
    """

    step: int
    reason: str
    loss: float | str
    norm: float | str
    losses: list[float | str]
    ids: list[list[str]]
    gradients: list[str]


class StepGuard:
    """Decides for all ranks alike whether an optimizer step is taken.

    Args:
        max_bad_steps: skipped steps in a row with which the run ends.
        skip_spikes: how many robust standard deviations above the last steps a loss or a gradient
            norm may lie; 0 skips nothing that is finite.
        signals: those of this process; what the ranks decide about them is remembered there.
        folder: of the run, for the report.

    Attributes:
        skipped: steps that were not taken since the start of the run.
        owes_evaluation: whether the last step's evaluation was cut short by a signal.
        in_row: such steps since the last one that was taken.
        verdict: of the micro-batch that has just been run: whether the step that it completed was
            taken, None if it completed none.
    """

    def __init__(
        self,
        *,
        max_bad_steps: int = 10,
        skip_spikes: float = 0.0,
        signals: StopSignals | None = None,
        folder: Path | None = None,
    ) -> None:
        self.max_bad_steps = max_bad_steps
        self.signals = signals or StopSignals()
        self.folder = folder
        self.skipped = 0
        self.in_row = 0
        self.step = 0  # the last one that was decided about
        self.owes_evaluation = False
        self.entries: deque[SkippedStep] = deque(maxlen=MAX_ENTRIES)
        self.windows = {name: SpikeWindow(skip_spikes) for name in ("loss", "norm")}
        self._taken = self._left_out = 0  # since the last log
        self._left_out_loss = 0.0
        self._losses: list[Tensor] = []
        self._ids: list[str] = []
        self._put_back: Callable[[], None] | None = None
        self.verdict: bool | None = None
        self._pending: Tensor | None = None

    def attach(self, engine: Any, *, step: int) -> None:
        """Stand between an engine's gradients and its optimizer.

        Args:
            engine: a DeepSpeed engine at ZeRO stage 0, 1 or 2, with `clip_without_zero` done.
            step: steps that an earlier start of the run did.
        """
        self.engine, self.step = engine, step
        put_before_optimizer(engine, self.judge)

    def add(self, loss: Tensor, ids: Sequence[str]) -> None:
        """Note one micro-batch's loss, before its backward."""
        if not self._losses:
            self._ids = []
        self._losses.append(loss.detach().double())
        self._ids += ids[: MAX_IDS - len(self._ids)]

    def before_forward(self) -> None:
        """Remember, before a step's first forward pass, what its passes may change."""
        if self._put_back is None:
            self._put_back = keep_statistics(self.engine.module)

    def judge(self, norm: Tensor | float) -> bool:
        """Whether the step is taken. A collective; called once for each optimizer step.

        Args:
            norm: L2 norm of all gradients, the same on every rank; negative or not finite if any
                gradient is not finite.
        """
        self.step += 1
        mine = torch.stack(self._losses).mean() if self._losses else torch.tensor(0.0).double()
        loss, norm = self._over_ranks(mine, norm)
        self._losses = []
        put_back, self._put_back = self._put_back or _nothing, None
        reason = self._reason(loss, norm)
        self.verdict = reason is None
        if reason is None:
            self.in_row = 0
            self._taken += 1
            return True
        self.skipped += 1
        self.in_row += 1
        self._left_out += 1
        self._left_out_loss += loss
        put_back()
        self._report(reason, loss, norm, float(mine))
        return False

    def _over_ranks(self, mine: Tensor, norm: Tensor | float) -> tuple[float, float]:
        """(mean loss, gradient norm) that every rank goes by; the ranks' signals on the way.

        The norm is rank 0's, so that a last bit cannot make ranks differ; NaN if any rank's is bad.
        """
        device = mine.device
        own = torch.as_tensor(norm, dtype=torch.float64, device=device)
        bad = ~torch.isfinite(own) | (own < 0)
        shown = own if runtime.is_main() else torch.zeros_like(own)
        received = self.signals.received
        flags = [float(received == number) for number in _NUMBERS]
        vector = torch.cat(
            [
                torch.stack([mine, torch.where(bad, 0.0, shown), bad.double()]),
                torch.tensor(flags, dtype=torch.float64, device=device),
            ]
        )
        if runtime.world_size() > 1:
            dist.all_reduce(vector)
        total, norm_0, any_bad, *came = vector.tolist()
        found = [number for number, count in zip(_NUMBERS, came, strict=True) if count]
        self.signals.agree(strongest(found or [0]))
        return total / runtime.world_size(), math.nan if any_bad else norm_0

    def _reason(self, loss: float, norm: float) -> str | None:
        """Why a step is bad, in words; None if it is not."""
        values = {"loss": loss, "norm": norm}
        if bad := [_WORDS[name] for name, value in values.items() if not math.isfinite(value)]:
            return f"{' and '.join(bad)} not finite"
        limits = {name: window.threshold for name, window in self.windows.items()}
        spikes = [name for name, value in values.items() if self.windows[name].add(value)]
        if not spikes:
            return None
        told = [f"{_WORDS[name]} {values[name]:.4g} above {limits[name]:.4g}" for name in spikes]
        return f"spike: {' and '.join(told)}"

    def _report(self, reason: str, loss: float, norm: float, mine: float) -> None:
        """Say and write down what was skipped. A collective."""
        found = [] if math.isfinite(norm) else nonfinite_gradients(self.engine)
        everyone = runtime.gather_objects((mine, self._ids))
        entry = SkippedStep(
            step=self.step,
            reason=reason,
            loss=_json_number(loss),
            norm=_json_number(norm),
            losses=[_json_number(value) for value, _ in everyone],
            ids=[ids for _, ids in everyone],
            gradients=found[:MAX_GRADIENTS],
        )
        self.entries.append(entry)
        if runtime.is_main():
            where = f" ({found[0]})" if found else ""
            logger.warning("step %d skipped: %s%s", self.step, reason, where)
            self._write()

    def _write(self) -> None:
        if self.folder is not None:
            record = {
                "skipped": self.skipped,
                "in_a_row": self.in_row,
                "max_bad_steps": self.max_bad_steps,
                "steps": [asdict(entry) for entry in self.entries],
            }
            aside = self.folder / f"{REPORT}.tmp"
            aside.write_text(json.dumps(record, indent=1))
            aside.replace(self.folder / REPORT)

    def counted(self, loss: Tensor) -> Tensor:
        """What a micro-batch adds to the logged loss: its step's sum, once that step was taken.

        Raises:
            BadNumbersError: on every rank, after too many skipped steps in a row.
        """
        self._pending = loss if self._pending is None else self._pending + loss
        verdict, self.verdict = self.verdict, None
        if verdict is None:
            return torch.zeros_like(loss)
        total, self._pending = self._pending, None
        if verdict:
            return total
        if self.in_row >= self.max_bad_steps:
            raise self._error()
        return torch.zeros_like(loss)

    def _error(self) -> BadNumbersError:
        last = self.entries[-1]
        named = f", first at {last.gradients[0]}" if last.gradients else ""
        place = f" {str(self.folder / REPORT)!r} names" if self.folder else " The report names"
        return BadNumbersError(
            f"{self.in_row} steps in a row were skipped, the last is {last.step}: {last.reason}"
            f"{named}.{place} samples and parameters. Look at those samples, or take a lower "
            "--learning_rate or --max_grad_norm, or raise --max_bad_steps "
            f"({self.max_bad_steps}). The last checkpoint is as good as it was."
        )

    def summary(self, loss: float) -> dict[str, float]:
        """The logged loss over the steps that were taken, and how many were not since the start.

        Where no step was taken it is the mean loss of those that were skipped.

        Args:
            loss: the sum over taken steps, divided by all steps of the interval.
        """
        if self._left_out and self._taken:
            loss *= (self._taken + self._left_out) / self._taken
        elif self._left_out:
            loss = self._left_out_loss / self._left_out
        self._taken = self._left_out = 0
        self._left_out_loss = 0.0
        return {"loss": loss, "train/skipped_steps": self.skipped}

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to decide and log as this one would."""
        return {
            "skipped": self.skipped,
            "in_row": self.in_row,
            "owes_evaluation": self.owes_evaluation,
            "interval": [self._taken, self._left_out, _json_number(self._left_out_loss)],
            "windows": {name: list(window.values) for name, window in self.windows.items()},
            "entries": [asdict(entry) for entry in self.entries],
        }

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Go on from the `state` of a checkpoint; one of an earlier release has none."""
        if not state:
            return
        self.skipped, self.in_row = state["skipped"], state["in_row"]
        self.owes_evaluation = state["owes_evaluation"]
        self._taken, self._left_out, left_out_loss = state["interval"]
        self._left_out_loss = float(left_out_loss)
        for name, values in state["windows"].items():
            self.windows[name] = SpikeWindow(self.windows[name].sigma, values)
        self.entries.clear()
        self.entries.extend(SkippedStep(**entry) for entry in state["entries"])


_WORDS = {"loss": "loss", "norm": "gradient norm"}
_NUMBERS = tuple(int(number) for number in SIGNALS)


def _nothing() -> None:
    """What a step that ran no forward pass has to put back."""


def _json_number(value: float) -> float | str:
    """JSON has no NaN: a number that is not finite becomes its name, which `float` reads."""
    return value if math.isfinite(value) else str(value)
