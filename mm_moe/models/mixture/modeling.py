"""The mixture-of-experts autoencoder (MMVAE, Shi et al. 2019) for any pattern of modalities.

Axes: B samples, N packed rows of one modality, K draws, L latent width, V values of a row,
M modalities, called R where an expert has drawn a latent and D where a decoder reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Laplace, Normal, kl_divergence
from transformers.utils import ModelOutput

from mm_moe.backbones.base import ArrayNeeds, Payload
from mm_moe.data.schema import DataSource
from mm_moe.errors import ConfigError, DataError
from mm_moe.models.mixture.configuration import MixtureVAEConfig
from mm_moe.models.mixture.densities import FAMILIES, simplex_scale
from mm_moe.models.mixture.draws import Draws
from mm_moe.models.mixture.networks import Decoder, Encoder
from mm_moe.models.own import OwnModel, Processor, count_trainable
from mm_moe.models.rows import packed_rows
from mm_moe.models.sequence_processing import ArrayProcessor
from mm_moe.moe.layer import RoutingRecord


@dataclass
class MixtureOutput(ModelOutput):
    """What a forward pass returns.

    Attributes:
        features: modality -> location of its expert (B, L), zero rows where it is absent.
        losses: none.
        routing: none.
    """

    features: dict[str, Tensor] = None  # type: ignore[assignment]  # the library wants defaults
    losses: dict[str, Tensor] = None  # type: ignore[assignment]
    routing: dict[str, RoutingRecord] = None  # type: ignore[assignment]


class MixtureVAE(OwnModel):
    """p(z) prod_m p(x_m | z) with the posterior (1 / M) sum_m q_m(z | x_m).

    A sample that lacks modalities has the mixture of the experts of what it has, and the product of
    their likelihoods. Every encoder and decoder runs in every batch, on a blank row of weight 0 if
    there is nothing for it: the same graph on every process.

    The bounds that it is trained on stand in `pretrain/mixture.py`.
    """

    config: MixtureVAEConfig
    config_class = MixtureVAEConfig

    def __init__(self, config: MixtureVAEConfig) -> None:
        super().__init__(config)
        self.modalities = tuple(config.modalities)
        encoders, decoders = {}, {}
        for name in self.modalities:
            build: dict[str, Any] = {
                "latent_size": config.latent_size,
                "options": config.network(name),
            }
            encoders[name] = Encoder(config.shape(name), **build)
            decoders[name] = Decoder(config.shape(name), **build)
        self.encoders, self.decoders = nn.ModuleDict(encoders), nn.ModuleDict(decoders)
        self.prior_logits: nn.Parameter | None = None
        if config.learn_prior:
            self.prior_logits = nn.Parameter(torch.zeros(config.latent_size))
        counts = [name for name in self.modalities if config.likelihood(name).counts]
        self.log_dispersions = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(config.num_values(name))) for name in counts}
        )
        self.post_init()

    @classmethod
    def config_for(cls, source: DataSource, options: Mapping[str, Any]) -> MixtureVAEConfig:
        """The configuration for a data set of arrays.

        Raises:
            ConfigError: an option that does not exist or that only the data decide, or a modality
                that is no array.
        """
        return MixtureVAEConfig.for_data(source.array_shapes, source.modalities, options)

    def processors(self) -> dict[str, Processor]:
        """Arrays of one shape, divided by their scale."""
        arrays = {name: self.config.arrays[name] for name in self.modalities}
        needs = {
            name: ArrayNeeds(self.config.shape(name), float(about.get("scale", 1.0)))
            for name, about in arrays.items()
        }
        return {name: ArrayProcessor(need) for name, need in needs.items()}

    def prior(self) -> Laplace | Normal:
        """p(z), of batch shape (L,)."""
        like = next(self.parameters())
        zeros_L = _wide(like.new_zeros(self.config.latent_size))
        logits_L = zeros_L if self.prior_logits is None else _wide(self.prior_logits)
        scale_L = zeros_L + 1 if self.prior_logits is None else simplex_scale(logits_L)
        return FAMILIES[self.config.prior](zeros_L, scale_L, validate_args=False)

    def encode(self, values: Tensor, modality: str) -> Laplace | Normal:
        """The expert q_m(z | x_m) of rows (N, *shape), of batch shape (N, L).

        Raises:
            ConfigError: a modality that the model does not have.
            DataError: rows of another shape, or counts below 0.
        """
        location_NL, scale_NL = self._encoded(values, self._known(modality))
        return FAMILIES[self.config.posterior](location_NL, scale_NL, validate_args=False)

    def decode(self, z_NL: Tensor, modality: str) -> torch.distributions.Distribution:
        """The distribution p(x_m | z) of a modality's values, of batch shape (N, V).

        Raises:
            ConfigError: a modality that the model does not have.
        """
        likelihood = self.config.likelihood(self._known(modality))
        return likelihood.distribution(self._said(z_NL, modality), self._dispersion(modality))

    @torch.no_grad()
    def translate(self, values: Tensor, source: str, target: str) -> Tensor:
        """Expected rows (N, *shape) of `target` for rows of `source`, at its expert's location.

        Raises:
            ConfigError: a modality that the model does not have.
            DataError: rows of another shape.
        """
        return self.generate_rows(self.encode(values, source).mean, target)

    @torch.no_grad()
    def generate_rows(self, z_NL: Tensor, modality: str) -> Tensor:
        """Expected rows (N, *shape) of a modality for latents."""
        return self.decode(z_NL, modality).mean.unflatten(-1, self.config.shape(modality))

    def forward(
        self,
        present: Tensor,
        inputs: Mapping[str, Payload],
        labels: Tensor | None = None,
        ids: list[str] | None = None,
        interaction: Tensor | None = None,
        run: Callable[[MixtureVAE], Any] | None = None,
    ) -> Any:
        """Locations of the experts of what is present.

        Args:
            present: bool (B, M).
            inputs: modality -> {"values": (N, *shape)}, one row per present sample, in order.
            labels: not used; accepted so that a batch is a call.
            ids: likewise.
            interaction: likewise.
            run: what to do with this model instead, for an objective: it is then one forward pass
                of whatever is wrapped around the model.

        Raises:
            DataError: a payload whose rows are not the samples that have the modality.
        """
        if run is not None:
            return run(self)
        location_RBL, _ = self._experts(present, inputs)
        features = dict(zip(self.modalities, location_RBL * present.T[..., None], strict=True))
        return MixtureOutput(features=features, losses={}, routing={})

    def draw(
        self,
        present: Tensor,
        inputs: Mapping[str, Payload],
        *,
        samples: int,
        cross: bool = True,
        uniform_BRKL: Tensor | None = None,
    ) -> Draws:
        """Draw from every expert and score the draws.

        Args:
            present: as of `forward`.
            inputs: likewise.
            samples: K, draws from each expert.
            cross: every decoder reads the draws of every expert (M * M decodings of a sample), not
                of its own alone.
            uniform_BRKL: float64 in (0, 1), whose quantiles are taken for draws; no generator is
                asked then.

        Raises:
            DataError: see `forward`.
        """
        location_RBL, scale_RBL = self._experts(present, inputs)
        family = FAMILIES[self.config.posterior]
        expert, prior = family(location_RBL, scale_RBL, validate_args=False), self.prior()
        if uniform_BRKL is None:
            z_RKBL = expert.rsample(torch.Size([samples])).transpose(0, 1)
        else:
            z_RKBL = quantiles(expert, uniform_BRKL.permute(2, 1, 0, 3)).transpose(0, 1)
        return Draws(
            present_BM=present,
            family=family,
            location_RBL=location_RBL,
            scale_RBL=scale_RBL,
            z_RKBL=z_RKBL,
            log_prior_RKB=prior.log_prob(z_RKBL).sum(-1),
            log_px_DRKB=torch.stack(
                [self._log_px(d, z_RKBL, present, inputs, cross) for d in self.modalities]
            ),
            kl_RB=kl_divergence(expert, prior).sum(-1),
        )

    def _experts(self, present_BM: Tensor, inputs: Mapping[str, Payload]) -> tuple[Tensor, Tensor]:
        """Locations and scales (R, B, L); 0 and 1 where a modality is absent."""
        locations, scales = [], []
        for name, rows_N in packed_rows(present_BM, inputs, self.modalities).items():
            blank = not len(rows_N)
            values = self._blank(name) if blank else inputs[name]["values"]
            location_NL, scale_NL = self._encoded(values, name)
            nothing = 0 * (location_NL.sum() + scale_NL.sum()) if blank else 0
            location_BL = location_NL.new_zeros(len(present_BM), location_NL.shape[-1])
            if blank:
                locations.append(location_BL + nothing)
                scales.append(location_BL + 1 + nothing)
                continue
            locations.append(location_BL.index_copy(0, rows_N, location_NL))
            scales.append((location_BL + 1).index_copy(0, rows_N, scale_NL))
        return torch.stack(locations), torch.stack(scales)

    def _log_px(
        self,
        name: str,
        z_RKBL: Tensor,
        present_BM: Tensor,
        inputs: Mapping[str, Payload],
        cross: bool,
    ) -> Tensor:
        """Weighted log p(x_d | z_r) of one decoder (R, K, B), in one pass over all latents."""
        d, (_, count, rows, _) = self.modalities.index(name), z_RKBL.shape
        own_B = present_BM[:, d]
        taken = {
            r: (own_B & present_BM[:, r]).nonzero().squeeze(1)
            for r in range(len(z_RKBL))
            if cross or r == d
        }
        read = [z_RKBL[r][:, rows_n].flatten(0, 1) for r, rows_n in taken.items()]
        blank = not sum(map(len, read))
        z_NL = torch.cat([*read, z_RKBL.new_zeros(1, z_RKBL.shape[-1])] if blank else read)
        said_NV = self._said(z_NL, name)
        result_RKB = [z_RKBL.new_zeros(count, rows) for _ in range(len(z_RKBL))]
        if blank:
            dispersion = self._dispersion(name)
            nothing = 0 * said_NV.sum() + (0 if dispersion is None else 0 * dispersion.sum())
            return torch.stack(result_RKB) + nothing
        likelihood, weight = self.config.likelihood(name), self.config.weight(name)
        values_NV = _wide(inputs[name]["values"].flatten(1))
        place_B = own_B.cumsum(0) - 1
        pieces = said_NV.split([count * len(rows_n) for rows_n in taken.values()])
        for (r, rows_n), said in zip(taken.items(), pieces, strict=True):
            said_KnV = said.unflatten(0, (count, len(rows_n)))
            values_KnV = values_NV[place_B[rows_n]].expand_as(said_KnV)
            log_Kn = likelihood.log_prob(values_KnV, said_KnV, self._dispersion(name))
            result_RKB[r] = result_RKB[r].index_copy(1, rows_n, weight * log_Kn)
        return torch.stack(result_RKB)

    def _encoded(self, values: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """Location and scale (N, L)."""
        shape, counts = self.config.shape(name), self.config.likelihood(name).counts
        if tuple(values.shape[1:]) != shape:
            raise DataError(
                f"a row of {name!r} has shape {tuple(values.shape[1:])}; the model takes {shape}."
            )
        if counts and bool((values < 0).any()):
            raise DataError(
                f"a row of {name!r} holds {values.min().item():g}, and counts are not negative; "
                "give raw counts, or another likelihood."
            )
        rows_NV = values.flatten(1)
        rows_NV = rows_NV.log1p() if counts else rows_NV
        like = next(self.encoders[name].parameters())
        location_NL, logits_NL = self.encoders[name](rows_NV.to(like.dtype))
        return _wide(location_NL), simplex_scale(_wide(logits_NL))

    def _said(self, z_NL: Tensor, name: str) -> Tensor:
        """What a decoder says of latents, (N, V)."""
        like = next(self.decoders[name].parameters())
        return _wide(self.decoders[name](z_NL.to(like.dtype)))

    def _dispersion(self, name: str) -> Tensor | None:
        return _wide(self.log_dispersions[name]) if name in self.log_dispersions else None

    def _blank(self, name: str) -> Tensor:
        return next(self.parameters()).new_zeros(1, *self.config.shape(name))

    def _known(self, modality: str) -> str:
        if modality not in self.modalities:
            raise ConfigError(
                f"the model has no modality {modality!r}; it has {', '.join(self.modalities)}."
            )
        return modality

    def trainable_report(self) -> list[tuple[str, int]]:
        """(part, number of trainable values)."""
        found = [
            (f"{name} {what}", count_trainable(part))
            for what, parts in (("encoder", self.encoders), ("decoder", self.decoders))
            for name, part in parts.items()
        ]
        rest = count_trainable(self) - sum(count for _, count in found)
        return [*found, ("prior and dispersions", rest)]


def quantiles(expert: Laplace | Normal, uniform: Tensor) -> Tensor:
    """Where the distribution function is `uniform` (float64): in float32 a draw could be at 1."""
    wide = type(expert)(expert.loc.double(), expert.scale.double(), validate_args=False)
    return wide.icdf(uniform).to(expert.loc.dtype)


def _wide(values: Tensor) -> Tensor:
    """At least float32."""
    return values if values.dtype == torch.float64 else values.float()
