"""Experts of unlike shapes, each whole on one process: rows travel to them, and results back.

A router has no say here: which expert a row goes to is a fact of the row (its species, its sensor).
Like a sparse layer the container knows no ranks; `make_expert_parallel` swaps its placement.

E experts, L of them held here, R rows sorted by expert, T entries of all rows together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn

from mm_moe.errors import ConfigError


class Plan(ABC):
    """Where the rows of one batch go. Every process makes the same calls, also without a row.

    Attributes:
        counts: rows that arrive here for each expert held here (L,).
    """

    counts: list[int]

    @abstractmethod
    def send(self, x: Tensor) -> Tensor:
        """The rows (sum of counts, D) that arrive from rows (R, D); gradients go back."""

    @abstractmethod
    def back(self, y: Tensor) -> Tensor:
        """What became of the rows, at home again in their order; gradients go back."""

    @abstractmethod
    def send_entries(self, entries: Tensor, per_row: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of unlike length: entries (T,) and how many each row has, int64 (R,), arrived.

        Not differentiable.
        """


class LocalPlan(Plan):
    """All experts are here."""

    def __init__(self, rows_E: Tensor) -> None:
        self.counts = rows_E.tolist()

    def send(self, x: Tensor) -> Tensor:
        """The rows are there."""
        return x

    def back(self, y: Tensor) -> Tensor:
        """The rows are here."""
        return y

    def send_entries(self, entries: Tensor, per_row: Tensor) -> tuple[Tensor, Tensor]:
        """The entries are there."""
        return entries, per_row


class Placement(ABC):
    """Where experts are. Not a module: it leaves no trace in a checkpoint."""

    @abstractmethod
    def plan(self, rows_E: Tensor) -> Plan:
        """The plan for this process' rows: int64 (E,), how many go to each expert. A collective."""

    @abstractmethod
    def sum_over_holders(self, values: Tensor) -> Tensor:
        """Sum over the processes that hold the same experts. Not differentiable."""


class LocalPlacement(Placement):
    """All experts are in this process."""

    def plan(self, rows_E: Tensor) -> Plan:
        """Nothing to move."""
        return LocalPlan(rows_E)

    def sum_over_holders(self, values: Tensor) -> Tensor:
        """This process is the only one."""
        return values


class PlacedExperts(nn.Module):
    """Named experts with the same structure and parameters of unlike shapes.

    An expert must bear parameters that are larger than its own sizes at the end of a dimension: a
    process holds all its parameters in the shape of the largest expert at the same place, because
    DeepSpeed wants equal sizes on all processes. The surplus must have no influence.

    Args:
        experts: name -> expert, in the order that all processes agree on.

    Attributes:
        names: of all experts.
        experts: those that are held here.

    Raises:
        ConfigError: a name that is no name of a module.
    """

    def __init__(self, experts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name in experts:
            if not name or "." in name:
                raise ConfigError(f"an expert's name ({name!r}) must have a letter and no dot.")
        self.names = tuple(experts)
        self.experts = nn.ModuleDict(experts)
        self.placement: Placement = LocalPlacement()

    @property
    def local_names(self) -> tuple[str, ...]:
        """Names of the experts that are held here, in order."""
        return tuple(self.experts)


def placed_layers(model: nn.Module) -> dict[str, PlacedExperts]:
    """The containers of placed experts in a model by their full names."""
    return {name: part for name, part in model.named_modules() if isinstance(part, PlacedExperts)}
