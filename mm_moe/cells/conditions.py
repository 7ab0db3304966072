"""What is known of a cell beside its counts, and how it bends the latent vector.

The latent need not carry what the decoder is told: the assay, the donor, the species.

N cells, D latent width, K columns, C labels of a column (with the unknown ones), Q rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_moe.cells.configuration import SPECIES, CellVAEConfig
from mm_moe.errors import ConfigError
from mm_moe.registry import nearest

UNKNOWN = 0  # the code of a label that is not known


class Vocabulary:
    """The labels of one column as rows of a table, each species' own ones one after the other.

    Args:
        labels: species -> labels, or "" -> the labels that all species share.
        species: in the model's order.
    """

    def __init__(self, labels: Mapping[str, Sequence[str]], *, species: Sequence[str]) -> None:
        shared = "" in labels
        groups = [tuple(labels.get("" if shared else name, ())) for name in species]
        self.groups = groups[:1] if shared else groups
        self.first = [0]
        for group in self.groups:
            self.first.append(self.first[-1] + 1 + len(group))
        self.shared = shared

    @property
    def size(self) -> int:
        """C: rows of the table; each group begins with its unknown label."""
        return self.first[-1]

    @property
    def num_labels(self) -> int:
        """Known labels."""
        return self.size - len(self.groups)

    def places(self, code_N: Tensor, species_N: Tensor) -> Tensor:
        """Rows (N,) of the table of codes."""
        if self.shared:
            return code_N
        return torch.tensor(self.first, device=code_N.device)[species_N] + code_N

    def classes(self, code_N: Tensor, species_N: Tensor) -> Tensor:
        """Numbers (N,) from 0 of known labels, for a classifier; -100 where the label is not."""
        group_N = torch.zeros_like(species_N) if self.shared else species_N
        found_N = self.places(code_N, species_N) - group_N - 1
        return torch.where(code_N == UNKNOWN, -100, found_N)

    def code(self, label: str | None, *, species: int) -> int:
        """The code of a label; one that the model never saw is unknown."""
        group = self.groups[0 if self.shared else species]
        return group.index(label) + 1 if label in group else UNKNOWN


class ConditionBank(nn.Module):
    """One map of z for each label of one column, the identity before any training.

    The source maps z by Linear and LayerNorm without weights, which takes from z its length; here a
    label's map is z + W z + b with W and b from 0 ("linear"), the same with a W of low rank, or
    z (1 + g) + b ("film").

    An unknown label has the mean of its group's maps, so that it is right on average for labels
    never seen; without a known label there it is the identity.

    Args:
        vocabulary: of the column.
        width: D.
        kind: "linear" or "film".
        rank: Q of a linear map, 0 for a full one.
    """

    def __init__(self, vocabulary: Vocabulary, width: int, *, kind: str, rank: int = 0) -> None:
        super().__init__()
        self.vocabulary, self.kind, self.rank = vocabulary, kind, rank
        labels = vocabulary.num_labels
        self.shift = nn.Parameter(torch.zeros(labels, width))
        self.scale: nn.Parameter | None = None
        self.down: nn.Parameter | None = None
        if kind == "film":
            self.scale = nn.Parameter(torch.zeros(labels, width))
        elif rank:
            self.scale = nn.Parameter(torch.zeros(labels, rank, width))
            self.down = nn.Parameter(torch.empty(labels, width, rank))
            nn.init.normal_(self.down, std=width**-0.5)
        else:
            self.scale = nn.Parameter(torch.zeros(labels, width, width))

    def forward(self, z: Tensor, code_N: Tensor, species_N: Tensor) -> Tensor:
        """Each row (N, D) by its label's map."""
        assert self.scale is not None
        z = z.to(self.shift.dtype)
        shift_ND = self._of(self.shift, code_N, species_N)
        scale = self._of(self.scale, code_N, species_N)
        if self.kind == "film":
            return z * (1 + scale) + shift_ND
        low = z
        if self.down is not None:
            low = torch.einsum("nd,ndq->nq", z, self._of(self.down, code_N, species_N))
        return z + torch.einsum("nq,nqd->nd", low, scale) + shift_ND

    def _of(self, table: Tensor, code_N: Tensor, species_N: Tensor) -> Tensor:
        """The entries (N, ...) of each row's label."""
        return self._with_unknown(table)[self.vocabulary.places(code_N, species_N)]

    def _with_unknown(self, table: Tensor) -> Tensor:
        """The table (C, ...) of known labels with each group's unknown one before them."""
        parts, done = [], 0
        for group in self.vocabulary.groups:
            own, done = table[done : done + len(group)], done + len(group)
            mean = own.mean(0, keepdim=True) if group else own.new_zeros(1, *table.shape[1:])
            parts += [mean, own]
        return torch.cat(parts)


class Conditioner(nn.Module):
    """All columns' banks, in one order for good.

    Args:
        config: of the model.
    """

    def __init__(self, config: CellVAEConfig) -> None:
        super().__init__()
        self.mode, self.names = config.conditioner, config.applied
        self.columns, species = config.columns, config.modalities
        self.vocabularies = {
            name: Vocabulary(config.labels(name), species=species)
            for name in (SPECIES, *config.columns)
        }
        width = config.latent_size
        kind = "film" if self.mode == "film" else "linear"
        self.banks = nn.ModuleDict(
            {
                f"of_{name}": ConditionBank(
                    self.vocabularies[name], width, kind=kind, rank=config.condition_rank
                )
                for name in self.names
            }
        )
        self.join: nn.Linear | None = None
        if self.mode == "concat":
            self.join = nn.Linear(width * len(self.names), width)

    def forward(self, z: Tensor, conditions: Tensor, species_N: Tensor) -> Tensor:
        """The latent (N, D) as the decoder gets it.

        Args:
            z: (N, D).
            conditions: codes (N, K) in the order of the configuration's columns.
            species_N: index of the species whose decoder it is for.
        """
        given = z
        parts = []
        for name in self.names:
            code_N = self.codes(name, conditions, species_N)
            bent = self.banks[f"of_{name}"](
                given if self.join is not None else z, code_N, species_N
            )
            if self.join is None:
                z = bent
            parts.append(bent)
        return z if self.join is None else F.relu(self.join(torch.cat(parts, dim=-1)))

    def codes(self, name: str, conditions: Tensor, species_N: Tensor) -> Tensor:
        """Codes (N,) of one column."""
        if name == SPECIES:
            return species_N + 1
        return conditions[:, self.columns.index(name)]

    def classes(self, name: str, conditions: Tensor, species_N: Tensor) -> Tensor:
        """Numbers (N,) of the labels of one column, for a classifier; -100 where unknown."""
        code_N = self.codes(name, conditions, species_N)
        return self.vocabularies[name].classes(code_N, species_N)

    def override(
        self,
        conditions: Tensor,
        labels: Mapping[str, str | Sequence[str | None] | None],
        *,
        species: int,
        keep: Sequence[str] = (),
    ) -> Tensor:
        """Codes (N, K) for a decoder of another species.

        Args:
            conditions: codes of the cells at home.
            labels: column -> the label of all cells, or one for each.
            species: index of the target.
            keep: columns whose codes stay; those that are neither kept nor named are unknown.

        Raises:
            ConfigError: an unknown column, labels that are not one per cell, or a species' own
                column that is to be kept.
        """
        found = torch.full_like(conditions, UNKNOWN)
        for name in (*keep, *labels):
            if name not in self.columns:
                hint = nearest(name, list(self.columns))
                raise ConfigError(f"unknown column {name!r}; {hint}")
        for name in keep:
            if not self.vocabularies[name].shared:
                raise ConfigError(
                    f"column {name!r} has labels of each species' own: those of a cell say nothing "
                    "in another species. Name a label of the target."
                )
            place = self.columns.index(name)
            found[:, place] = conditions[:, place]
        for name, given in labels.items():
            each = [given] * len(found) if given is None or isinstance(given, str) else list(given)
            if len(each) != len(found):
                raise ConfigError(
                    f"{len(each)} labels of {name!r} for {len(found)} cells; give one, or one each."
                )
            codes = [self.vocabularies[name].code(label, species=species) for label in each]
            found[:, self.columns.index(name)] = torch.tensor(codes, device=found.device)
        return found
