"""What a run carries from step to step beside its tensors, so that a resumed run logs the same.

`transformers.Trainer` adds up the loss between two logs and does not save the sum: after a resume
in between it would log the mean of what came later.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Carried(Protocol):
    """A part of a run with a state of its own on every rank.

    A state is a dict of numbers, strings, tensors, and lists and dicts of them.
    """

    def state_dict(self) -> dict[str, Any]:
        """This rank's state."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state over."""

    def dealt(
        self, states: Sequence[dict[str, Any]], *, rank: int, world_size: int
    ) -> dict[str, Any]:
        """The state of one of `world_size` ranks, from those of another number of ranks."""


class LibrarySums:
    """What `transformers.Trainer` adds up between two logs; see `Trainer._inner_training_loop`.

    Args:
        trainer: whose sums are meant.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def state_dict(self) -> dict[str, Any]:
        """The loss since the last log, the step of that log, and the operations since."""
        return {
            "loss": self.trainer._tr_loss.detach().cpu().clone(),
            "last_logged": int(self.trainer._globalstep_last_logged),
            "flos": float(self.trainer.current_flos),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on adding."""
        self.trainer._tr_loss = state["loss"].to(self.trainer.args.device)
        self.trainer._globalstep_last_logged = state["last_logged"]
        self.trainer.current_flos = state["flos"]

    def dealt(
        self, states: Sequence[dict[str, Any]], *, rank: int, world_size: int
    ) -> dict[str, Any]:
        """The log is a mean over ranks for the loss, a sum for the operations."""
        return {
            "loss": sum(state["loss"] for state in states) / len(states),
            "last_logged": states[0]["last_logged"],
            "flos": sum(state["flos"] for state in states) / world_size,
        }
