"""What a fill adds to the memory of a micro-batch: support rows, its own activations.

The towers encode support rows beside those of the samples, so that a batch has more rows than
samples; a fill's own pass is recorded on fake tensors by itself. Both are upper estimates: supports
are as many as are asked for, and where the share of missing modalities is not known, every sample
lacks half of them.

B samples, M modalities, P tokens of a modality, H width, Q missing cells, S support rows, N
supports of a cell.
"""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mm_moe.fill.base import Cells, Fill, SupportTokens
from mm_moe.models.modeling import MultimodalMoEModel
from mm_moe.moe.noise import GatherOverRanks, Noise
from mm_moe.training.estimate import DEVIATIONS
from mm_moe.training.planned import Workload, fake_weights
from mm_moe.training.timeline import Recorder

SIZES = (101, 211, 307)  # B, Q and S of a recording; as primes, no size is another's
UNKNOWN = 0.5  # share of a modality's samples that lack it, where nobody says


class FillPlan:
    """The rows and bytes of one fill.

    Args:
        build: the fill on the meta device, with the experts of one process; called repeatedly.
        present_DM: bool, what many drawn samples have; where all have everything, the share of
            missing modalities is not known.
        train_rows: of the split that lends; None where only a pass would tell.
        load: of the micro-batch.
    """

    def __init__(
        self,
        build: Callable[[], Fill],
        present_DM: Tensor,
        *,
        train_rows: int | None,
        load: Workload,
    ) -> None:
        self.build, self.train_rows, self.load = build, train_rows, load
        self.kind = build()
        names = self.kind.shape.modalities
        lost_D = (~present_DM).sum(1).double()
        self.share, self.own = dict.fromkeys(names, UNKNOWN), (1 - UNKNOWN) * len(names)
        self.mean, self.deviation = UNKNOWN * len(names), 0.0  # missing cells of a sample
        if lost_D.any():
            self.mean, self.deviation = lost_D.mean().item(), lost_D.std().item()
            shares = (~present_DM).double().mean(0).tolist()
            self.share = dict(zip(names, shares, strict=True))
            self.own = ((len(names) - lost_D) * lost_D).sum().item() / lost_D.sum().item()

    @classmethod
    def of(
        cls,
        build: Callable[[], MultimodalMoEModel],
        present_DM: Tensor,
        *,
        train_rows: int | None,
        load: Workload,
    ) -> FillPlan | None:
        """The plan of a model's fill; None without one."""
        if build().fill is None:
            return None
        return cls(lambda: _fill(build()), present_DM, train_rows=train_rows, load=load)

    def cells(self, samples: int) -> dict[str, int]:
        """Modality -> samples that lack it, as many as chance gives in hundreds of batches."""
        more = 1 + DEVIATIONS * self.deviation / (math.sqrt(samples) * self.mean)
        return {
            name: min(samples, math.ceil(samples * share * more))
            for name, share in self.share.items()
        }

    def supports(self, samples: int) -> dict[str, int]:
        """Modality -> support rows that have it; 0 of a fill that asks for none."""
        if not self.kind.needs_supports:
            return dict.fromkeys(self.share, 0)
        drawn = self.kind.num_supports or max(1.0, self.own)
        most = math.inf if self.train_rows is None else self.train_rows
        found = {
            name: int(min(most, math.ceil(count * drawn)))
            for name, count in self.cells(samples).items()
        }
        if not self.kind.needs_whole:
            return found
        every = sum(found.values())  # rows come with what else they have
        share = {name: math.ceil(every * (1 - lost)) for name, lost in self.share.items()}
        return {name: int(min(most, max(found[name], share[name]))) for name in found}

    def rows(self, samples: int, own: Mapping[str, int]) -> dict[str, int]:
        """Rows of each modality that a tower encodes, where the samples have `own` of them."""
        more = self.supports(samples)
        if not self.kind.needs_supports:
            return dict(own)
        lacking = self.cells(samples)
        return {name: max(1, samples - lacking[name]) + more[name] for name in own}

    def bytes(self, samples: int) -> int:
        """Bytes that the fill adds: features of support rows, and its own activations."""
        shape, lent = self.kind.shape, self.supports(samples).values()
        rows = sum(lent)
        element = 2 if self.load.half else 4
        features = rows * len(shape.modalities) * shape.num_tokens * shape.width * element
        units = _units(samples, sum(self.cells(samples).values()), rows, square=max(lent) ** 2)
        live_V = units @ self._live
        return features + max(0, round(live_V.max()))

    @functools.cached_property
    def _live(self) -> np.ndarray:
        """Bytes of the fill's own pass at each moment, per unit of `_units`."""
        samples, cells, rows = SIZES
        cases = [SIZES, (2 * samples, cells, rows), (samples, 2 * cells, rows)]
        cases += [(samples, cells, 2 * rows), (samples, cells, 3 * rows)]
        fills = [self.build() for _ in cases]  # a pass uses one up
        gc.disable()  # a collection in the middle would move the moment at which bytes go
        try:
            with FakeTensorMode():
                found = [
                    _recorded(*one, own=self.own, load=self.load)
                    for one in zip(fills, cases, strict=True)
                ]
        finally:
            gc.enable()
        table = np.array([_units(*case, square=case[-1] ** 2) for case in cases])
        return np.linalg.solve(table, np.array(found, dtype=np.float64))


def plan_bytes(plan: FillPlan | None, samples: int) -> int:
    """`FillPlan.bytes`, 0 without a fill."""
    return 0 if plan is None else plan.bytes(samples)


def _recorded(fill: Fill, sizes: tuple[int, int, int], *, own: float, load: Workload) -> list[int]:
    """Live bytes after each allocation of a pass over B samples, Q cells and S supports."""
    samples, count, rows = sizes
    fake_weights(fill.train(), load=load)
    for layer in fill.sparse_layers().values():
        if noise := layer.router.wanted_noise():
            planned = _PlannedNoise(noise.draw, noise.columns)
            vars(layer.router)["wanted_noise"] = lambda planned=planned: planned
    shape, num_modalities = fill.shape, len(fill.shape.modalities)
    dtype = torch.bfloat16 if load.half else torch.float32
    size = (shape.num_tokens, shape.width)
    lent = fill.num_supports or max(1, num_modalities - 1)  # padded to the longest
    supports = {}
    if fill.needs_supports:
        supports[shape.modalities[0]] = SupportTokens(
            torch.empty(rows, *size, dtype=dtype, requires_grad=True),
            torch.empty(count, lent, dtype=torch.int64),
            torch.empty(rows, num_modalities, dtype=torch.bool),
            torch.empty(rows, dtype=torch.int64),
        )
    cells = Cells(
        torch.empty(samples, num_modalities, *size, dtype=dtype, requires_grad=True),
        torch.empty(samples, num_modalities, dtype=torch.bool),
        torch.empty(count, dtype=torch.int64),
        torch.empty(count, dtype=torch.int64),
        supports,
    )
    kept = math.ceil(count * size[0] * (own + (fill.num_supports or max(1.0, own))))
    weights = [*fill.parameters(), *fill.buffers(), *_tensors(cells)]
    recorder = _FillRecorder(kept, count, weights)
    with recorder:
        made = fill.make(cells)
        if made is None or not made[0].requires_grad:
            return [0, *recorder.history]
        y_QPH, records = made
        filled = y_QPH.sum()
        for record in records.values():
            filled = filled + sum(record.losses.values())
        filled.backward()
    return recorder.history


def _fill(model: MultimodalMoEModel) -> Fill:
    assert model.fill is not None  # asked before
    return model.fill


def _units(samples: int, cells: int, rows: int, *, square: int) -> np.ndarray:
    """What bytes are linear in; supports of one modality are compared with those of another."""
    return np.array([1, samples, cells, rows, square], dtype=np.float64)


class _PlannedNoise(Noise):
    """Makes the tensors of a router's noise without asking a generator for its seed."""

    def of_batch(
        self, num_tokens: int, *, device: torch.device, gather_over_ranks: GatherOverRanks
    ) -> Tensor:
        """Values (T, columns)."""
        return self.draw(0, torch.arange(num_tokens, device=device), self.columns)


class _FillRecorder(Recorder):
    """A `Recorder` of a fill's pass.

    Args:
        kept: tokens that a mask leaves for the experts.
        cells: Q; all of them are of the modality that lends.
        known: tensors that are there before.
    """

    def __init__(self, kept: int, cells: int, known: list[Tensor]) -> None:
        super().__init__(0, 0, known)
        self.kept, self.cells = kept, cells

    def _planned(self, func: Any, args: tuple, kwargs: dict) -> Tensor | None:
        if func is torch.ops.aten.nonzero.default:
            rows = self.cells if args[0].numel() == self.cells else self.kept
            return args[0].new_empty(rows, args[0].ndim, dtype=torch.int64)
        return super()._planned(func, args, kwargs)


def _tensors(cells: Cells) -> list[Tensor]:
    found = [cells.tokens_BMPH, cells.present_BM, cells.sample_Q, cells.modality_Q]
    for support in cells.supports.values():
        found += [support.tokens_SPH, support.rows_QN, support.present_SM]
        found += [] if support.index_S is None else [support.index_S]
    return found
