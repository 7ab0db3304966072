"""Latents drawn from every expert of a batch, and the log-densities that bounds are made of.

Axes: B samples, K draws, L latent width, M modalities, called R where an expert has drawn a latent
and D where a decoder reads it. Entries of a modality that a sample lacks mean nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributions import Laplace, Normal


@dataclass(frozen=True)
class Draws:
    """What one pass of a mixture autoencoder knows.

    Attributes:
        present_BM: bool.
        family: of the experts.
        location_RBL: of the experts.
        scale_RBL: likewise.
        z_RKBL: draws; every density below was computed from this very tensor, so that a hook on it
            changes all that flows back into the experts through the draws.
        log_prior_RKB: log p(z).
        log_px_DRKB: log p(x_d | z_r), times the modality's weight; 0 where the sample lacks either,
            or where d is not r in a pass without cross terms.
        kl_RB: KL(q_r || p).
    """

    present_BM: Tensor
    family: type[Laplace] | type[Normal]
    location_RBL: Tensor
    scale_RBL: Tensor
    z_RKBL: Tensor
    log_prior_RKB: Tensor
    log_px_DRKB: Tensor
    kl_RB: Tensor

    @property
    def present_RB(self) -> Tensor:
        """Presence with the modalities in front."""
        return self.present_BM.T

    def log_experts(self, *, path_only: bool = False, draws_fixed: bool = False) -> Tensor:
        """Log q_m(z_r) as (M, R, K, B).

        Args:
            path_only: no gradient to the experts' parameters but through the draws.
            draws_fixed: no gradient through the draws.
        """
        location_RBL, scale_RBL, z_RKBL = self.location_RBL, self.scale_RBL, self.z_RKBL
        if path_only:
            location_RBL, scale_RBL = location_RBL.detach(), scale_RBL.detach()
        if draws_fixed:
            z_RKBL = z_RKBL.detach()
        expert = self.family(
            location_RBL[:, None, None], scale_RBL[:, None, None], validate_args=False
        )
        return expert.log_prob(z_RKBL[None]).sum(-1)

    def log_posterior(self, *, path_only: bool = False) -> Tensor:
        """Log q(z_r | x) of the mixture of the experts that a sample has, (R, K, B)."""
        log_MRKB = self.log_experts(path_only=path_only)
        lacking_M11B = ~self.present_RB[:, None, None]
        # not -inf: in a row without any modality the gradient would be nan
        log_MRKB = log_MRKB.masked_fill(lacking_M11B, torch.finfo(log_MRKB.dtype).min / 2)
        count_B = self.present_BM.sum(1).clamp(min=1)
        return log_MRKB.logsumexp(0) - count_B.to(log_MRKB.dtype).log()

    def log_weights(self, *, path_only: bool = False) -> Tensor:
        """Log w = log p(z_r) + sum_d log p(x_d | z_r) - log q(z_r | x), (R, K, B)."""
        return (
            self.log_prior_RKB + self.log_px_DRKB.sum(0) - self.log_posterior(path_only=path_only)
        )
