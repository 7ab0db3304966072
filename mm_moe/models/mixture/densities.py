"""Distributions over latents and over data.

N rows, L latent width, V values of a row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution, Laplace, NegativeBinomial, Normal
from torch.nn import functional as F

from mm_moe.errors import ConfigError
from mm_moe.registry import nearest

FAMILIES: Mapping[str, type[Laplace] | type[Normal]] = MappingProxyType(
    {"laplace": Laplace, "normal": Normal}
)
LIKELIHOODS = ("laplace", "normal", "bernoulli", "nb")
LEAST_SCALE = 1e-6
LARGEST_LOG_MEAN = 15.0  # of counts; beyond it float32 gradients overflow


def simplex_scale(logits: Tensor) -> Tensor:
    """Scales (..., L) that sum to L, plus a little: Shi et al. 2019.

    The sum cannot collapse, so a posterior can sharpen in some places only by widening in others.
    """
    return logits.softmax(-1) * logits.shape[-1] + LEAST_SCALE


@dataclass(frozen=True)
class Likelihood:
    """How values are spread around what a decoder says.

    Attributes:
        kind: "laplace" or "normal" (of a fixed scale), "bernoulli" (values in [0, 1]), or "nb": the
            negative binomial of counts, whose mean is the exponential of what the decoder says and
            whose dispersion is learnt for each value. Its library size is not given apart: the
            latent carries it.
        scale: of the first two.
        unit: the mean of the first two is squeezed into (0, 1) by a sigmoid, for pictures.
    """

    kind: str = "laplace"
    scale: float = 0.75
    unit: bool = False

    @classmethod
    def of(cls, name: str, options: Mapping[str, Any]) -> Likelihood:
        """The likelihood of a modality from its options.

        Raises:
            ConfigError: an unknown option or kind, or a scale that is not above 0.
        """
        known = [each.name for each in fields(cls)]
        for key in options:
            if key not in known:
                raise ConfigError(f"unknown option {key!r} of likelihoods.{name}; it has {known}.")
        found = cls(**options)
        if found.kind not in LIKELIHOODS:
            hint = nearest(str(found.kind), list(LIKELIHOODS))
            raise ConfigError(f"unknown likelihood {found.kind!r} of {name!r}; {hint}")
        if not 0 < found.scale < math.inf:
            raise ConfigError(f"likelihoods.{name}.scale ({found.scale}) must be above 0.")
        return found

    @property
    def counts(self) -> bool:
        """Whether the values are counts."""
        return self.kind == "nb"

    def distribution(self, said_NV: Tensor, log_dispersion_V: Tensor | None = None) -> Distribution:
        """The distribution of the values, around what the decoder says (N, V)."""
        if self.kind == "bernoulli":
            return Bernoulli(logits=said_NV, validate_args=False)
        if self.kind == "nb":
            assert log_dispersion_V is not None
            log_mean_NV = said_NV.clamp(max=LARGEST_LOG_MEAN)
            return NegativeBinomial(
                log_dispersion_V.exp(), logits=log_mean_NV - log_dispersion_V, validate_args=False
            )
        family = FAMILIES[self.kind]
        mean_NV = torch.sigmoid(said_NV) if self.unit else said_NV
        return family(mean_NV, torch.full_like(mean_NV, self.scale), validate_args=False)

    def log_prob(
        self, values_NV: Tensor, said_NV: Tensor, log_dispersion_V: Tensor | None = None
    ) -> Tensor:
        """Log p of each row, summed over its values: (N,)."""
        if self.kind == "bernoulli":  # values between 0 and 1 are shares, as pictures have them
            each = F.binary_cross_entropy_with_logits(said_NV, values_NV, reduction="none")
            return -each.sum(-1)
        if self.kind in FAMILIES:  # by hand: of a scale that is one number (half of the time)
            mean_NV = torch.sigmoid(said_NV) if self.unit else said_NV
            off_NV = (values_NV - mean_NV) / self.scale
            if self.kind == "laplace":
                return -off_NV.abs().sum(-1) - off_NV.shape[-1] * math.log(2 * self.scale)
            constant = math.log(self.scale * math.sqrt(2 * math.pi))
            return -off_NV.pow(2).sum(-1) / 2 - off_NV.shape[-1] * constant
        return self.distribution(said_NV, log_dispersion_V).log_prob(values_NV).sum(-1)
