"""What a mixture-of-experts autoencoder is made of, as the `config.json` of a folder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from mm_moe.errors import ConfigError
from mm_moe.models.mixture.densities import FAMILIES, Likelihood
from mm_moe.models.mixture.networks import check_network
from mm_moe.registry import nearest

FROM_DATA = ("modalities", "arrays")  # never an option of a run


@strict
class MixtureVAEConfig(PreTrainedConfig):
    """One encoder and one decoder per modality, around one latent vector.

    Attributes:
        modalities: in their fixed order.
        arrays: modality -> {"shape", "scale"}: of one row, and what its values are divided by.
        latent_size: width of the latent vector.
        posterior: family of each expert, "laplace" or "normal".
        prior: family of the prior, likewise; its location is 0.
        learn_prior: whether the prior's scale is learnt; otherwise it is 1.
        networks: modality -> {"kind": "mlp", "hidden": [400]} (an empty list is one linear map) or
            {"kind": "cnn", "channels": 32} for pictures and spectrograms. Default: an mlp.
        likelihoods: modality -> {"kind", "scale", "unit"}, see `Likelihood`. Default: Laplace with
            scale 0.75, as Shi et al. have it.
        likelihood_weights: modality -> factor of its log-likelihood. None: most values of any
            modality / values of this one, so that a modality of many values does not drown another.
    """

    model_type = "mm_moe_mixture_vae"

    modalities: list[str] | tuple[str, ...] = ()
    arrays: dict[str, dict[str, Any]] = field(default_factory=dict)
    latent_size: int = 20
    posterior: str = "laplace"
    prior: str = "laplace"
    learn_prior: bool = True
    networks: dict[str, dict[str, Any]] = field(default_factory=dict)
    likelihoods: dict[str, dict[str, Any]] = field(default_factory=dict)
    likelihood_weights: dict[str, float] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Check names and numbers.

        Raises:
            ConfigError: an unknown family, option or modality, or a number out of range.
        """
        self.modalities = list(self.modalities)
        super().__post_init__(**kwargs)
        for what, family in (("posterior", self.posterior), ("prior", self.prior)):
            if family not in FAMILIES:
                raise ConfigError(f"unknown {what} {family!r}; {nearest(family, list(FAMILIES))}")
        if self.latent_size < 1:
            raise ConfigError(f"latent_size ({self.latent_size}) must be at least 1.")
        for key in ("networks", "likelihoods", "likelihood_weights", "arrays"):
            for name in getattr(self, key) or {}:
                if name not in self.modalities:
                    known = ", ".join(self.modalities)
                    raise ConfigError(f"{key} names {name!r}; the modalities are {known}.")
        for name in self.modalities:
            if name not in self.arrays:
                raise ConfigError(
                    f"modality {name!r} is no array of one shape, which this model needs; take a "
                    "data set of arrays (MNIST pictures, spectrograms, expression vectors)."
                )
            check_network(name, self.network(name), self.shape(name))
            self.likelihood(name)
        for name, weight in (self.likelihood_weights or {}).items():
            if not 0 < weight < math.inf:
                raise ConfigError(f"likelihood_weights.{name} ({weight}) must be above 0.")

    @classmethod
    def for_data(
        cls,
        arrays: Mapping[str, Mapping[str, Any]],
        modalities: Sequence[str],
        options: Mapping[str, Any],
    ) -> MixtureVAEConfig:
        """The configuration for a data set's arrays, with a run's options.

        Raises:
            ConfigError: an option that does not exist or that only the data decide.
        """
        known = [key for key in cls.__annotations__ if key not in (*FROM_DATA, "model_type")]
        for key in options:
            if key not in known:
                raise ConfigError(f"unknown option {key!r} of model_config; {nearest(key, known)}")
        own = {name: dict(about) for name, about in arrays.items()}
        return cls(modalities=list(modalities), arrays=own, **options)

    @property
    def prompt(self) -> str:
        """No part of this model takes prompts."""
        return "none"

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one row of a modality."""
        return tuple(self.arrays[name]["shape"])

    def num_values(self, name: str) -> int:
        """Values in one row of a modality."""
        return math.prod(self.shape(name))

    def network(self, name: str) -> dict[str, Any]:
        """The network's options of a modality."""
        return {"kind": "mlp", **self.networks.get(name, {})}

    def likelihood(self, name: str) -> Likelihood:
        """The likelihood of a modality."""
        return Likelihood.of(name, self.likelihoods.get(name, {}))

    def weight(self, name: str) -> float:
        """The factor of a modality's log-likelihood."""
        if self.likelihood_weights is not None:
            return float(self.likelihood_weights.get(name, 1.0))
        return max(map(self.num_values, self.modalities)) / self.num_values(name)
