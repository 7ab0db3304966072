"""The passes of one batch through experts and core, wherever the experts are.

A cell lives on the process that loaded it; its latent and all that is shared are computed there.
What is as wide as a gene list is computed where the expert of that species is and stays there:
counts travel to it once, as sparse rows; after that rows of the core's width travel, and losses are
summed up where they arise. So no matrix of genes is ever sent, and the loader need not know who
holds which species.

N cells of this process sorted by species, R rows where their experts are, G genes, D latent width,
W width of an expert's output, K columns of conditions, S species.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mm_moe.cells.conditions import Conditioner
from mm_moe.cells.configuration import CellVAEConfig
from mm_moe.cells.core import CoreVAE, Posterior, wide
from mm_moe.cells.counts import GeneRows, Payload, SparseRows, check_payload
from mm_moe.cells.species import Generated, SpeciesExpert
from mm_moe.errors import DataError
from mm_moe.moe.batch_norm import forgetting
from mm_moe.moe.placed import PlacedExperts, Plan


@dataclass(frozen=True)
class Cells:
    """The cells of a batch.

    Attributes:
        rows_N: their places in the batch.
        species_N: index of the species of each.
        conditions: codes (N, K).
        plan: how rows reach the experts.
        genes: for each expert held here, the cells that arrived.
    """

    rows_N: Tensor
    species_N: Tensor
    conditions: Tensor
    plan: Plan
    genes: list[GeneRows]

    def __len__(self) -> int:
        return len(self.rows_N)


@dataclass(frozen=True)
class Crossing:
    """Cells as another species would have them.

    Attributes:
        target_N: index of the target species of each cell.
        order_N: the cells sorted by target.
        plan: how those rows reach the targets' experts.
        generated: for each expert held here, what it made of the rows that arrived.
    """

    target_N: Tensor
    order_N: Tensor
    plan: Plan
    generated: list[Generated]


class Passes:
    """What can be done with one batch; see the module.

    Every process makes the same calls in the same order, also without a cell.
    """

    cells: Cells

    def __init__(
        self,
        species: PlacedExperts,
        core: CoreVAE,
        conditioner: Conditioner,
        config: CellVAEConfig,
    ) -> None:
        self.species, self.core, self.conditioner = species, core, conditioner
        self.config = config
        self.modalities = tuple(config.modalities)

    @property
    def experts(self) -> list[SpeciesExpert]:
        """Those held here, in order."""
        return list(self.species.experts.values())  # type: ignore[arg-type]

    def begin(self, present: Tensor, inputs: Mapping[str, Payload]) -> Passes:
        """Take a batch and bring its counts to the experts. A collective.

        Raises:
            DataError: a row of two species, or counts of other genes or cells.
        """
        if int(present.sum(1).max() if len(present) else 0) > 1:
            raise DataError("a cell is marked as being of two species; it can be of one only.")
        rows = [present[:, m].nonzero().squeeze(1) for m in range(len(self.modalities))]
        parts, conditions = [], []
        dtype = wide(self.core.encoder.mu.weight.new_zeros(())).dtype
        for m, name in enumerate(self.modalities):
            payload = inputs.get(name)
            if payload is None:
                payload = self._nothing(name, present.device)
            check_payload(
                payload,
                species=name,
                num_genes=len(self.config.genes[name]),
                count=len(rows[m]),
            )
            parts.append(SparseRows.of(payload, dtype=dtype))
            conditions.append(self._conditions(payload, len(rows[m]), present.device))
        counts_S = torch.tensor([len(part) for part in rows], device=present.device)
        plan = self.species.placement.plan(counts_S)
        arrived = SparseRows.joined(parts).sent(plan).split(plan.counts)
        genes = [
            GeneRows(part, expert.num_genes)
            for part, expert in zip(arrived, self.experts, strict=True)
        ]
        species_N = torch.arange(len(rows), device=present.device).repeat_interleave(counts_S)
        self.cells = Cells(torch.cat(rows), species_N, torch.cat(conditions), plan, genes)
        return self

    def _nothing(self, name: str, device: torch.device) -> Payload:
        """No cell of a species."""
        return {"values": torch.zeros(0, len(self.config.genes[name]), device=device)}

    def _conditions(self, payload: Payload, count: int, device: torch.device) -> Tensor:
        columns = len(self.config.columns)
        found = payload.get("conditions")
        if found is None:
            return torch.zeros(count, columns, dtype=torch.int64, device=device)
        if found.shape[1] != columns:
            raise DataError(
                f"cells have {found.shape[1]} columns of conditions, the model knows {columns} "
                f"({', '.join(self.config.columns) or 'none'})."
            )
        return found

    def posterior(self) -> Posterior:
        """The posterior of every cell, at home."""
        return self._core_of([rows.profile for rows in self.cells.genes], self.cells.plan)

    def _core_of(self, profiles: list[Tensor], plan: Plan) -> Posterior:
        pairs = zip(self.experts, profiles, strict=True)
        h = torch.cat([expert.encode(profile) for expert, profile in pairs])
        found: Posterior = self.core.encoder(plan.back(h))
        return found

    def generate(self, z: Tensor) -> list[Generated]:
        """Each expert's word on its own cells, from their latents (N, D)."""
        bent = self.conditioner(z, self.cells.conditions, self.cells.species_N)
        return self._decode(self.core.decode(bent), self.cells.plan)

    def _decode(self, d: Tensor, plan: Plan) -> list[Generated]:
        arrived = plan.send(d).split(plan.counts)
        return [expert.decode(part) for expert, part in zip(self.experts, arrived, strict=True)]

    def errors(self, generated: list[Generated]) -> list[Tensor]:
        """Reconstruction losses (R,) of the cells of each expert held here."""
        return [
            expert.loss(said, rows)
            for expert, said, rows in zip(self.experts, generated, self.cells.genes, strict=True)
        ]

    def reconstruction(self, z: Tensor) -> Tensor:
        """Reconstruction loss (N,) of every cell, at home."""
        each_R = torch.cat(self.errors(self.generate(z)))
        return self.cells.plan.back(each_R.unsqueeze(1)).squeeze(1)

    def cross(self, z: Tensor, *, shift: int = 1) -> Crossing:
        """Every cell as the species `shift` places further would have it.

        Conditions are those of `translate`: the target, the kept columns, and nothing else.
        """
        cells, kinds = self.cells, len(self.modalities)
        target_N = (cells.species_N + shift) % kinds
        conditions = torch.zeros_like(cells.conditions)
        for name in self.config.kept_columns:
            place = self.config.columns.index(name)
            conditions[:, place] = cells.conditions[:, place]
        d = self.core.decode(self.conditioner(z, conditions, target_N))
        order_N = torch.argsort(target_N, stable=True)
        counts_S = torch.bincount(target_N, minlength=kinds)
        plan = self.species.placement.plan(counts_S)
        return Crossing(target_N, order_N, plan, self._decode(d[order_N], plan))

    def posterior_of(self, crossing: Crossing) -> Posterior:
        """The posterior of the generated cells, read by the targets' experts; in home order."""
        with forgetting(self.species, self.core):
            found = self._core_of([said.profile for said in crossing.generated], crossing.plan)
        back_N = torch.argsort(crossing.order_N)
        hidden = {name: values[back_N] for name, values in found.hidden.items()}
        return Posterior(found.mu[back_N], found.logvar[back_N], hidden)
