"""The cell autoencoder: species experts around one shared, conditioned core.

N cells of a batch, R of them where their experts are, G genes of a species, D latent width,
K columns of conditions, S species.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from mm_moe.cells.conditions import Conditioner
from mm_moe.cells.configuration import FROM_DATA, CellVAEConfig
from mm_moe.cells.core import CoreVAE, Posterior, wide
from mm_moe.cells.counts import Payload
from mm_moe.cells.output import CellOutput
from mm_moe.cells.passes import Passes
from mm_moe.cells.species import SpeciesExpert
from mm_moe.data.cells.rows import log_normalise
from mm_moe.data.schema import DataSource
from mm_moe.data.unlabelled import Unlabelled
from mm_moe.errors import ConfigError
from mm_moe.models.own import OwnModel, Processor
from mm_moe.moe.placed import PlacedExperts
from mm_moe.registry import nearest


class CellVAE(OwnModel):
    """One latent space for cells of species that never occur together.

    Args:
        config: what the model is made of.
    """

    config: CellVAEConfig
    config_class = CellVAEConfig

    def __init__(self, config: CellVAEConfig) -> None:
        super().__init__(config)
        self.modalities = tuple(config.modalities)
        self.species = PlacedExperts(
            {
                name: SpeciesExpert(
                    len(config.genes[name]),
                    hidden=config.expert_hidden,
                    width=config.expert_width,
                    norm=config.expert_norm,
                    dropout=config.dropout,
                    likelihood=config.likelihood,
                )
                for name in self.modalities
            }
        )
        self.core = CoreVAE(
            width=config.expert_width,
            hidden=config.core_hidden,
            latent_size=config.latent_size,
            norm=config.core_norm,
        )
        self.conditioner = Conditioner(config)
        self.post_init()

    @classmethod
    def config_for(cls, source: DataSource, options: Mapping[str, Any]) -> PreTrainedConfig:
        """Genes and labels come from the data, all else from the options.

        Raises:
            ConfigError: an unknown option, or data that hold no cells.
        """
        from mm_moe.data.sets.cells import CellsData

        known = [
            name
            for name in CellVAEConfig.__annotations__
            if name not in FROM_DATA and name != "model_type"
        ]
        for option in options:
            if option not in known:
                raise ConfigError(f"unknown model_config {option!r}; {nearest(option, known)}")
        own = source.source if isinstance(source, Unlabelled) else source
        if not isinstance(own, CellsData):
            raise ConfigError(
                f"data set {source.name!r} holds no counts of cells; take --dataset cells."
            )
        if own.values != "counts":
            raise ConfigError(
                f"the model normalises counts itself, and these values are {own.values}; take "
                'counts ("values": "counts", perhaps another "layer").'
            )
        words = own.vocabulary
        try:
            return CellVAEConfig(
                modalities=list(own.modalities),
                genes={name: list(genes) for name, genes in words.genes.items()},
                conditions={name: list(labels) for name, labels in words.conditions.items()},
                **options,
            )
        except TypeError as error:
            raise ConfigError(f"--model_config: {error}.") from error

    @classmethod
    def count_experts(cls, source: DataSource) -> int:
        """One per species."""
        return len(source.modalities)

    def processors(self) -> dict[str, Processor]:
        """Each species' cells become compressed rows, which the model spreads on its device."""
        from mm_moe.data.cells.rows import CellProcessor

        return {
            name: CellProcessor(len(self.config.genes[name]), counts=True)
            for name in self.modalities
        }

    def expert(self, species: str) -> SpeciesExpert:
        """The expert of one species.

        Raises:
            ConfigError: the model does not know it, or another process holds it.
        """
        if species not in self.species.local_names:
            hint = nearest(species, list(self.modalities))
            raise ConfigError(f"no expert of species {species!r} here; {hint}")
        return self.species.experts[species]  # type: ignore[return-value]

    def forward(
        self,
        present: Tensor,
        inputs: Mapping[str, Payload],
        labels: Tensor | None = None,
        ids: list[str] | None = None,
        interaction: Tensor | None = None,
        run: Callable[[Passes], CellOutput] | None = None,
    ) -> CellOutput:
        """The posterior of a batch's cells, and what reconstructing them from its mean costs.

        Args:
            present: bool (B, S), exactly one species a row; a row without any is left out.
            inputs: species -> {"values"} (N, G) or {"crow", "col", "val"}, with "library" (N,) and
                "conditions" (N, K).
            labels: not used; accepted so that a batch is a call.
            ids: likewise.
            interaction: likewise.
            run: what to do with the passes of this model instead, for an objective: all of them are
                then one forward pass of whatever is wrapped around the model.

        Raises:
            DataError: a row of two species, or counts of other genes.
        """
        passes = Passes(self.species, self.core, self.conditioner, self.config)
        if run is not None:
            return run(passes.begin(present, inputs))
        passes.begin(present, inputs)
        posterior = passes.posterior()
        return CellOutput(
            mu=posterior.mu,
            logvar=posterior.logvar,
            hidden=posterior.hidden,
            losses={"reconstruction": passes.reconstruction(posterior.mu)},
            routing={},
        )

    def encode(self, x: Tensor, species: str) -> Posterior:
        """The posterior of cells of one species.

        Args:
            x: counts (N, G), in the order of the model's genes.
            species: of the cells.

        Raises:
            ConfigError: an unknown species, or counts of another number of genes.
        """
        expert = self.expert(species)
        if x.shape[-1] != expert.num_genes:
            raise ConfigError(
                f"cells of {species!r} have {expert.num_genes} genes in this model, these have "
                f"{x.shape[-1]}."
            )
        found: Posterior = self.core.encoder(expert.encode(log_normalise(wide(x))))
        return found

    def decode(self, z: Tensor, species: str, metadata: Tensor | None = None) -> Tensor:
        """Expected log-normalised values (N, G) of latents in a species.

        Args:
            z: (N, D).
            species: whose genes are wanted.
            metadata: codes (N, K); None: all unknown.

        Raises:
            ConfigError: an unknown species.
        """
        expert = self.expert(species)
        if metadata is None:
            metadata = torch.zeros(
                len(z), len(self.config.columns), dtype=torch.int64, device=z.device
            )
        species_N = torch.full((len(z),), self.modalities.index(species), device=z.device)
        return expert.decode(self.core.decode(self.conditioner(z, metadata, species_N))).profile

    def translate(
        self,
        x: Tensor,
        source: str,
        target: str,
        metadata_override: Mapping[str, str | Sequence[str | None] | None] | None = None,
        *,
        metadata: Tensor | None = None,
    ) -> Tensor:
        """What cells of one species would look like in another (or in their own): (N, G_target).

        The latent is always conditioned on the target: its species, the labels that are named, and
        of the cells' own labels those of `config.kept_columns`; all else is unknown.

        Args:
            x: counts (N, G_source).
            source: species of the cells.
            target: species that is wanted.
            metadata_override: column -> label of all, or one for each cell; None is unknown.
            metadata: codes (N, K) of the cells, for the kept columns.

        Raises:
            ConfigError: an unknown species or column.
        """
        z = self.encode(x, source).mu
        if metadata is None:
            metadata = torch.zeros(
                len(x), len(self.config.columns), dtype=torch.int64, device=x.device
            )
        wanted = self.conditioner.override(
            metadata,
            metadata_override or {},
            species=self.modalities.index(self._known(target)),
            keep=self.config.kept_columns,
        )
        return self.decode(z, target, wanted)

    def _known(self, species: str) -> str:
        if species not in self.modalities:
            raise ConfigError(
                f"unknown species {species!r}; {nearest(species, list(self.modalities))}"
            )
        return species
