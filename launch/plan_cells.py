"""What a step of the cell autoencoder takes, for any number of cells, genes and entries.

N cells of a species, G its genes, E experts, R rows that arrive at an expert, T entries.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from launch.plan_model import held_names
from launch.plan_record import Factors, Small, factors
from mm_moe.batch import Batch
from mm_moe.cells.configuration import CellVAEConfig
from mm_moe.cells.modeling import CellVAE
from mm_moe.moe.parallel_exchange import Permute
from mm_moe.moe.placed import LocalPlacement, Plan
from mm_moe.training.planned import Arrive
from mm_moe.training.timeline import Timeline
from pretrain.cell_anchors import anchor_places
from pretrain.mmvae import CellObjective

GENES, CELLS, ENTRIES = (40, 120), (6, 40), (2, 20)  # from which small sizes are drawn
SPARE = 3  # recordings beyond the number of units, that tell whether these are all


@dataclass(frozen=True)
class Sizes:
    """Of one recording: species -> genes, cells of the group, entries of a cell; cells here.

    Attributes:
        anchors: genes that mean the same in all species; 0: there are none.
    """

    genes: dict[str, int]
    cells: dict[str, int]
    entries: dict[str, int]
    home: dict[str, int]
    anchors: int = 0


class PlannedPlan(Plan):
    """Makes the tensors that a `SpreadPlan` makes, without its collectives.

    Args:
        home: rows of this process.
        counts: rows that arrive at each expert held here.
        entries: of each arriving row.
    """

    def __init__(self, home: int, counts: list[int], entries: list[int]) -> None:
        self.home, self.counts = home, counts
        self.length_R = torch.tensor(entries).repeat_interleave(torch.tensor(counts))
        self.order_R = torch.arange(sum(counts))

    def send(self, x: Tensor) -> Tensor:
        """Exchange, then sort by expert."""
        return Permute.apply(Arrive.apply(x, sum(self.counts)), self.order_R, self.order_R)

    def back(self, y: Tensor) -> Tensor:
        """Sort by process, then exchange."""
        return Arrive.apply(Permute.apply(y, self.order_R, self.order_R), self.home)

    def send_entries(self, entries: Tensor, per_row: Tensor) -> tuple[Tensor, Tensor]:
        """Entries 0, 1, ... in each row; one of each, if that is what the rows have."""
        length_R = self.length_R.clamp(max=1) if len(entries) == len(per_row) else self.length_R
        begin_R = length_R.cumsum(0) - length_R
        places_T = torch.arange(int(length_R.sum())) - begin_R.repeat_interleave(length_R)
        found = places_T if entries.dtype == torch.int64 else torch.ones(len(places_T))
        return found.to(entries.dtype), length_R


class PlannedPlacement(LocalPlacement):
    """Some species are here, and cells of the whole group come to them.

    Args:
        sizes: of the recording.
        held: species that are here.
    """

    def __init__(self, sizes: Sizes, held: tuple[str, ...]) -> None:
        self.sizes, self.held, self.calls = sizes, held, 0

    def plan(self, rows_E: Tensor) -> Plan:
        """First the species' own cells, then those that are translated to it."""
        names = list(self.sizes.genes)
        shift, self.calls = min(self.calls, 1), self.calls + 1
        sources = [names[(names.index(name) - shift) % len(names)] for name in self.held]
        return PlannedPlan(
            int(rows_E.sum()),
            [self.sizes.cells[name] for name in sources],
            [self.sizes.entries[name] for name in sources],
        )


def record_cells(
    config: CellVAEConfig,
    objective: Callable[[], CellObjective],
    *,
    entries: Mapping[str, float],
    ep_size: int,
    half: bool,
) -> Timeline:
    """Bytes of activations, by cells of each species in the whole expert-parallel group.

    With `ep_size` 1 those are the cells of one process. Else "samples" are the cells of this
    process, of any species, and its experts are those that ask for most.

    Args:
        config: of the model, with all genes.
        objective: makes a new one.
        entries: species -> mean number of genes that a cell has.
        ep_size: processes that share the experts.
        half: bf16.
    """
    names = tuple(config.modalities)
    genes = {name: len(config.genes[name]) for name in names}
    held = held_names(names, weights=[genes[name] for name in names], ep_size=ep_size)

    def units_of(sizes: Sizes) -> dict[str, float]:
        return _units(sizes, held, spread=ep_size > 1)

    def build(sizes: Sizes) -> Small:
        return _small(config, objective(), sizes, held=held, ep_size=ep_size, half=half)

    drawn = np.random.default_rng(0)
    first = objective()
    anchors = 0
    if first.anchor_weight:
        anchors = len(next(iter(anchor_places(first.anchors, config.genes).values())))
    count = len(units_of(_draw(names, drawn, anchors=bool(anchors)))) + SPARE
    small = [_draw(names, drawn, anchors=bool(anchors)) for _ in range(count)]
    found = factors(build, small, units_of)
    real = Sizes(genes, dict.fromkeys(names, 0), {}, {}, anchors)
    return _timeline(found, names, real, entries, held, spread=ep_size > 1)


def _draw(names: tuple[str, ...], drawn: np.random.Generator, *, anchors: bool) -> Sizes:
    def each(low: int, high: int) -> dict[str, int]:
        return {name: int(drawn.integers(low, high)) for name in names}

    count = int(drawn.integers(*ENTRIES)) if anchors else 0
    return Sizes(each(*GENES), each(*CELLS), each(*ENTRIES), each(*CELLS), count)


def _units(sizes: Sizes, held: tuple[str, ...], *, spread: bool) -> dict[str, float]:
    found: dict[str, float] = {"1": 1.0}
    found |= {f"G {name}": float(sizes.genes[name]) for name in held}
    found |= {f"N {name}": float(count) for name, count in sizes.cells.items()}
    found |= {f"T {name}": float(n * sizes.entries[name]) for name, n in sizes.cells.items()}
    found |= {
        f"{name} x {other}": float(count * sizes.genes[other])
        for name, count in sizes.cells.items()
        for other in held
    }
    if sizes.anchors:
        found["A"] = float(sizes.anchors)
        found |= {f"{name} x A": float(n * sizes.anchors) for name, n in sizes.cells.items()}
    if spread and sizes.anchors:
        found |= {f"home {name} x A": float(n * sizes.anchors) for name, n in sizes.home.items()}
    if spread:
        found |= {f"home N {name}": float(n) for name, n in sizes.home.items()}
        found |= {
            f"home T {name}": float(n * sizes.entries[name]) for name, n in sizes.home.items()
        }
    return found


def _timeline(
    found: Factors,
    names: tuple[str, ...],
    real: Sizes,
    entries: Mapping[str, float],
    held: tuple[str, ...],
    *,
    spread: bool,
) -> Timeline:
    genes, anchors = real.genes, float(real.anchors)
    constant: dict[str, float] = {"1": 1.0, **{f"G {name}": float(genes[name]) for name in held}}
    constant["A"] = anchors
    sample: dict[str, float] = {}
    if spread:
        sample |= {f"home N {name}": 1 / len(names) for name in names}
        sample |= {f"home T {name}": entries[name] / len(names) for name in names}
        sample |= {f"home {name} x A": anchors / len(names) for name in names}
    rows = [
        {
            f"N {name}": 1.0,
            f"T {name}": entries[name],
            f"{name} x A": anchors,
            **{f"{name} x {other}": float(genes[other]) for other in held},
        }
        for name in names
    ]
    return found.timeline(names, [constant, sample, *rows])


def _small(
    config: CellVAEConfig,
    objective: CellObjective,
    sizes: Sizes,
    *,
    held: tuple[str, ...],
    ep_size: int,
    half: bool,
) -> Small:
    """The model with few genes and real widths."""
    config = copy.deepcopy(config)
    config.genes = {name: list(map(str, range(size))) for name, size in sizes.genes.items()}
    model = CellVAE(config)
    spread = ep_size > 1
    if spread:
        model.species.placement = PlannedPlacement(sizes, held)
        for name in sizes.genes:
            if name not in held:
                del model.species.experts[name]
    model = model.bfloat16() if half else model
    if sizes.anchors:  # the first genes of each species
        first = list(map(str, range(sizes.anchors)))
        objective.anchors = {name: first for name in sizes.genes}
    objective.prepare(model, device=torch.device("cpu"), seed=0)
    others = []
    if objective.adversary is not None:
        others.append(objective.adversary.optimizer)
    if objective.anchor is not None:
        others.append(objective.anchor.held.optimizer)
    if objective.critics is not None:
        objective.critics.most_auc = float("inf")  # none rests
        others += [critic.optimizer for critic in objective.critics.held.values()]

    def step(own: Any, batch: Batch) -> Any:
        if spread:
            own.species.placement.calls = 0
        return objective(own, batch)

    cells = sizes.home if spread else sizes.cells
    make = _maker(sizes, cells, columns=len(config.columns), half=half)
    return Small(model, step, make, others)


def _maker(
    sizes: Sizes, cells: Mapping[str, int], *, columns: int, half: bool
) -> Callable[[], Batch]:
    names = list(sizes.genes)
    dtype = torch.bfloat16 if half else torch.float32

    def payload(name: str) -> dict[str, Tensor]:
        count, entries = cells[name], sizes.entries[name]
        return {
            "crow": torch.arange(0, count * entries + 1, entries),
            "col": torch.arange(entries, dtype=torch.int32).repeat(count),
            "val": torch.ones(count * entries, dtype=dtype),
            "library": torch.full((count,), float(entries), dtype=dtype),
            "conditions": torch.zeros(count, columns, dtype=torch.int64),
        }

    def make() -> Batch:
        species = torch.arange(len(names)).repeat_interleave(
            torch.tensor([cells[name] for name in names])
        )
        present = species.unsqueeze(1) == torch.arange(len(names))
        ids = [str(row) for row in range(len(species))]
        return Batch.of(ids, present, {name: payload(name) for name in names})

    return make
