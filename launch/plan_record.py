"""The memory and arithmetic of a model of its own kind, from real steps at small sizes.

Such a model does with its batch what only values can say (entries of sparse rows, cells by species,
discriminators with steps of their own), so no fake pass tells its shapes. But the bytes of every
moment are linear in a few products of sizes: cells, genes, cells x genes, entries. A few steps with
little data and the real widths give the factors, and these the bytes at the real sizes.

N cells of a species, G genes, Q products of sizes ("units"), V moments, one per allocation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mm_moe.batch import Batch
from mm_moe.errors import ConfigError
from mm_moe.training.timeline import Recorder, Recording, Timeline, record_step

OFF = 0.01  # of the bytes at a moment, by which a recording may miss what the others say


class RealRecorder(Recorder):
    """Follows the bytes of a pass with real values.

    Args:
        known: tensors that are there before; not counted.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__(0, 0, known)

    def _planned(self, func: Any, args: tuple, kwargs: dict) -> None:
        """Values answer everything."""


@dataclass
class Small:
    """One model, objective and batch at small sizes.

    Attributes:
        model: whose gradients DeepSpeed would take.
        objective: as the trainer's.
        make_batch: the batch; called within the recording, so that it counts.
        others: optimizers beside DeepSpeed's, whose parameters and moments stay from step to step.
    """

    model: nn.Module
    objective: Callable[[nn.Module, Batch], Any]
    make_batch: Callable[[], Batch]
    others: Sequence[Optimizer] = field(default_factory=tuple)


def record(small: Small) -> Recording:
    """The second step of a training; in the first one the others make their moments."""
    model = small.model.train()
    small.objective(model, small.make_batch())[0].backward()
    known = [*model.parameters(), *model.buffers()]
    for optimizer in small.others:
        for parameter, state in optimizer.state.items():
            known += [parameter, *(value for value in state.values() if isinstance(value, Tensor))]
    return record_step(RealRecorder(known), model, small.objective, small.make_batch)


@dataclass(frozen=True)
class Factors:
    """Bytes per unit.

    Attributes:
        units: names of the products of sizes.
        live_QV: bytes at each moment.
        end_Q: bytes that are left.
        flops_Q: operations.
        marks: as of a `Timeline`.
    """

    units: tuple[str, ...]
    live_QV: np.ndarray
    end_Q: np.ndarray
    flops_Q: np.ndarray
    marks: list[tuple[int, str]]

    def timeline(self, names: tuple[str, ...], rows: Sequence[Mapping[str, float]]) -> Timeline:
        """A timeline whose coefficients are these.

        Args:
            names: of the rows, behind the constant and the samples.
            rows: for the constant, a sample, and a row of each name: unit -> how many of it.
        """
        mix = np.array([[row.get(unit, 0.0) for unit in self.units] for row in rows])
        return Timeline(
            names, mix @ self.live_QV, mix @ self.end_Q, mix @ self.flops_Q, list(self.marks)
        )


def factors(
    build: Callable[[Any], Small], sizes: Sequence[Any], units_of: Callable[[Any], dict[str, float]]
) -> Factors:
    """Record a step for each of some sizes and solve for the bytes per unit.

    Args:
        build: from sizes; what it draws does not touch torch's generator.
        sizes: at least as many as there are units, and no more alike than chance makes them.
        units_of: the products of sizes.

    Raises:
        ConfigError: the steps differ in more than their sizes.
    """
    with torch.random.fork_rng(devices=[]):
        runs = [record(build(one)) for one in sizes]
    units = [units_of(one) for one in sizes]
    names = tuple(units[0])
    table_RQ = np.array([[one[name] for name in names] for one in units], dtype=np.float64)
    if len({(len(run.live), tuple(name for _, name in run.marks)) for run in runs}) > 1:
        raise ConfigError(
            "the planner cannot follow this objective: its steps differ from batch to batch. A run "
            "of a few steps (--max_steps 3 --logging_steps 1) logs perf/memory_gb."
        )
    live_RV = np.array([run.live for run in runs], dtype=np.float64)
    live_QV = _solve(table_RQ, live_RV)
    missed_RV = np.abs(table_RQ @ live_QV - live_RV)
    if missed_RV.max() > OFF * live_RV.max():
        raise ConfigError(
            f"the planner cannot follow this objective: its memory is off by "
            f"{missed_RV.max() / live_RV.max():.0%} from anything linear in cells and genes. A run "
            "of a few steps (--max_steps 3 --logging_steps 1) logs perf/memory_gb."
        )
    end_Q = _solve(table_RQ, np.array([run.end for run in runs], dtype=np.float64))
    flops_Q = _solve(table_RQ, np.array([run.flops for run in runs], dtype=np.float64))
    return Factors(names, live_QV, end_Q, flops_Q, runs[0].marks)


def _solve(table_RQ: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Least squares, with columns of one length."""
    length_Q = np.linalg.norm(table_RQ, axis=0)
    length_Q[length_Q == 0] = 1.0
    found = np.linalg.lstsq(table_RQ / length_Q, values, rcond=1e-10)[0]
    return found / length_Q.reshape(-1, *[1] * (values.ndim - 1))
