"""Anchors: genes that mean the same in all species, which say how latents of species correspond.

Without any, nothing says which cells of one species are those of another but how many there are:
a latent in which species are mixed may take types for each other. An anchor needs no gene of the
model to be shared; a few dozen names will do, and a published model does not need them again.

N cells of this process, A anchors, S species, D latent width.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mm_moe.cells.passes import Passes
from mm_moe.errors import ConfigError
from mm_moe.registry import nearest
from mm_moe.training.collectives import num_ranks, sum_over_ranks
from mm_moe.training.discriminator import Discriminator

SAME_NAME = "same_name"
LEAST_SPREAD = 0.2  # of log-normalised values in a batch: a gene that is silent there stays small
Names = str | Mapping[str, Sequence[str]]


def anchor_places(anchors: Names, genes: Mapping[str, Sequence[str]]) -> dict[str, list[int]]:
    """Species -> places of the anchors among its genes, in the same order for all species.

    Args:
        anchors: "same_name" takes all genes whose names are the same up to case in every species;
            else species -> names, the i-th of each mean the same.
        genes: species -> names of its genes.

    Raises:
        ConfigError: anchors that do not fit, or none.
    """
    if anchors == SAME_NAME:
        anchors = _same_names(genes)
    if (
        not isinstance(anchors, Mapping)
        or set(anchors) != set(genes)
        or not all(isinstance(own, list | tuple) for own in anchors.values())
    ):
        raise ConfigError(
            f"objective_config.anchors ({_short(anchors)}) must be {SAME_NAME!r} or lists of genes "
            f"of each species ({', '.join(genes)})."
        )
    lengths = {name: len(own) for name, own in anchors.items()}
    if len(set(lengths.values())) > 1 or not min(lengths.values()):
        raise ConfigError(
            f"objective_config.anchors has {_short(lengths)} genes; name one or more, equally many "
            "in every species: the i-th of each mean the same."
        )
    return {name: _places(name, anchors[name], genes[name]) for name in genes}


def _places(species: str, wanted: Sequence[str], genes: Sequence[str]) -> list[int]:
    place = {gene: number for number, gene in enumerate(genes)}
    for gene in wanted:
        if gene not in place:
            hint = nearest(str(gene), list(genes))
            raise ConfigError(f"anchor {gene!r} is no gene of {species!r} in this model; {hint}")
    twice = [gene for gene, count in Counter(wanted).items() if count > 1]
    if twice:
        raise ConfigError(f"anchor {twice[0]!r} of {species!r} is named twice; name it once.")
    return [place[gene] for gene in wanted]


def _same_names(genes: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Names that every species has once, up to case."""
    known = {}
    for species, own in genes.items():
        count = Counter(gene.upper() for gene in own)
        known[species] = {gene.upper(): gene for gene in own if count[gene.upper()] == 1}
    both = sorted(set.intersection(*(set(own) for own in known.values())))
    if not both:
        raise ConfigError(
            f"objective_config.anchors is {SAME_NAME!r}, and no gene has the same name in "
            f"{' and '.join(genes)}; name pairs of genes, or leave anchors out."
        )
    return {species: [own[name] for name in both] for species, own in known.items()}


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class AnchorPlay:
    """One linear map for all species that reads the anchors from latent means.

    The map is trained beside the model and the model pays what the map does not know, so that both
    work to the same end (discriminators: against each other). Values are standardised within each
    species and batch, over all processes: what a gene's level is in a species says nothing about
    which cells correspond.

    Args:
        places: see `anchor_places`, in the order of the model's species.
        latent_size: D.
        learning_rate: of the map's Adam.
        steps: of the map for each of the model.
    """

    def __init__(
        self,
        places: Mapping[str, Sequence[int]],
        *,
        latent_size: int,
        learning_rate: float,
        steps: int,
    ) -> None:
        self.places, self.steps = places, steps
        self.count = len(next(iter(places.values())))
        self.held = Discriminator(
            nn.Linear(latent_size, self.count), learning_rate=learning_rate, sum_over=sum_over_ranks
        )

    def play(self, passes: Passes, mu: Tensor) -> tuple[Tensor, Tensor]:
        """Train the map on detached means, then what the model pays. A collective.

        Args:
            passes: of the batch.
            mu: posterior means (N, D).

        Returns:
            this process' part of the share of the anchors' variance that the map does not explain
            (the mean over processes is the share, whatever the number of anchors and however
            silent they are), and the share itself.
        """
        with torch.no_grad():
            truth_NA = self.truth(passes).to(mu)
            whole = sum_over_ranks(truth_NA.square().sum()).clamp(min=torch.finfo(mu.dtype).tiny)
        for _ in range(self.steps):
            self.held.step(lambda: self._error(mu.detach(), truth_NA) / whole)
        part = self._error(mu, truth_NA) / whole
        return part * num_ranks(), sum_over_ranks(part.detach())

    def truth(self, passes: Passes) -> Tensor:
        """Standardised values (N, A) of the anchors in the order of the cells. A collective."""
        cells = passes.cells
        names = passes.species.local_names
        parts = [
            rows.profile[:, list(self.places[name])]
            for name, rows in zip(names, cells.genes, strict=True)
        ]
        return standardised(
            cells.plan.back(torch.cat(parts)), cells.species_N, kinds=len(passes.modalities)
        )

    def _error(self, mu: Tensor, truth_NA: Tensor) -> Tensor:
        return (self.held.module(mu) - truth_NA).square().sum()


def standardised(x_NA: Tensor, species_N: Tensor, *, kinds: int) -> Tensor:
    """Mean 0 and variance 1 of each column within each species, over all processes. A collective.

    A standard deviation below `LEAST_SPREAD` counts as that.
    """
    x_NA = x_NA.double()
    moments = torch.cat([torch.ones_like(x_NA[:, :1]), x_NA, x_NA.square()], 1)
    total_SV = moments.new_zeros(kinds, moments.shape[1]).index_add(0, species_N, moments)
    total_SV = sum_over_ranks(total_SV)
    count_S1 = total_SV[:, :1].clamp(min=1)
    mean_SA, square_SA = (total_SV[:, 1:] / count_S1).chunk(2, 1)
    spread_SA = (square_SA - mean_SA.square()).clamp(min=0).sqrt().clamp(min=LEAST_SPREAD)
    return (x_NA - mean_SA[species_N]) / spread_SA[species_N]
