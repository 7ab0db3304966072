"""Bounds of a mixture-of-experts autoencoder on paired data (Shi et al. 2019, MMVAE).

Axes: B samples, K draws, M modalities, called R where an expert has drawn a latent and D where a
decoder reads it. w is p(x, z) / q(z | x), see `Draws.log_weights`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from mm_moe.batch import Batch
from mm_moe.errors import ConfigError
from mm_moe.models.mixture import MixtureOutput, MixtureVAE
from mm_moe.models.mixture.draws import Draws
from mm_moe.moe.noise import uniform_by_place
from mm_moe.registry import nearest
from mm_moe.training.collectives import mean_weight
from mm_moe.training.held_out import HeldOut


def elbo(draws: Draws) -> Tensor:
    """(1 / M) sum_r [E log p(x | z_r) - KL(q_r || p)], (B,).

    Below the ELBO of the mixture, because KL is convex in its first argument.
    """
    each_RB = draws.log_px_DRKB.sum(0).mean(1) - draws.kl_RB
    return _over_experts(each_RB, draws)


def m_elbo(draws: Draws) -> Tensor:
    """The same with every decoder reading its own expert's draws alone, (B,).

    (1 / M) sum_r [sum_d a_rd log p(x_d | z_d) - KL(q_r || p)] with the importance of another
    expert's draw a_rd = q_r(z_d) / q_d(z_d), whose z_d and q_d are held fixed, and a_rr = 1.
    M decodings instead of M * M; needs only draws without cross terms. The importances have no
    bound: with experts that lie far apart a few draws count for all.
    """
    log_q_MRKB = draws.log_experts(draws_fixed=True)  # log q_r(z_d) stands at [r, d]
    experts = range(len(log_q_MRKB))
    each_RB = [_importance_bound(draws, log_q_MRKB, r) for r in experts]
    return _over_experts(torch.stack(each_RB), draws)


def _importance_bound(draws: Draws, log_q_MRKB: Tensor, r: int) -> Tensor:
    """The term of one expert in `m_elbo`, (B,)."""
    total_B = -draws.kl_RB[r]
    for d in range(len(log_q_MRKB)):
        both_B = draws.present_RB[r] & draws.present_RB[d]
        log_share_KB = log_q_MRKB[r, d] - log_q_MRKB[d, d].detach()
        share_KB = log_share_KB.where(both_B, 0.0).exp() if r != d else 1.0
        total_B = total_B + (share_KB * draws.log_px_DRKB[d, d]).mean(0) * both_B
    return total_B


def iwae(draws: Draws) -> Tensor:
    """Log (1 / MK) sum_rk w, (B,): the tight bound, stratified over the experts."""
    log_RKB = draws.log_weights().masked_fill(~draws.present_RB[:, None], -torch.inf)
    count_B = draws.present_BM.sum(1)
    # a sample without any modality has no weight at all
    log_RKB = log_RKB.masked_fill(count_B == 0, 0.0)
    log_B = log_RKB.flatten(0, 1).logsumexp(0)
    return log_B - (count_B.clamp(min=1) * log_RKB.shape[1]).to(log_B).log()


def iwae_looser(draws: Draws) -> Tensor:
    """(1 / M) sum_r log (1 / K) sum_k w, (B,): no expert can leave the others aside."""
    return _over_experts(_log_mean(draws.log_weights()), draws)


def dreg_looser(draws: Draws) -> Tensor:
    """A value (B,) whose gradients are the doubly reparameterised ones of `iwae_looser`.

    With v = softmax_k log w: sum_k v d log w to decoders and prior, sum_k v^2 (d log w / dz) dz to
    the experts (Tucker et al. 2019), whose parameters are held fixed inside log q. The second
    v comes by a hook on the draws themselves: on a copy of them, as in the released code, it would
    not lie on the way of the gradient. One expert alone, or K = 1, gets an unbiased gradient. With
    several experts and K > 1 it is Shi et al.'s estimator and not the gradient of the bound for the
    experts (for the decoders it is): Tucker's identity needs draws from the density in the weight,
    and these come from one expert of the mixture.

    The value itself is sum_k v log w, not the bound.
    """
    log_w_RKB = draws.log_weights(path_only=True)
    share_RKB = log_w_RKB.detach().softmax(1)
    if draws.z_RKBL.requires_grad:  # not in a validation pass
        draws.z_RKBL.register_hook(lambda grad_RKBL: grad_RKBL * share_RKB[..., None])
    return _over_experts((share_RKB * log_w_RKB).sum(1), draws)


def _log_mean(log_w_RKB: Tensor) -> Tensor:
    """Log of the mean over draws, (R, B)."""
    return log_w_RKB.logsumexp(1) - math.log(log_w_RKB.shape[1])


def _over_experts(each_RB: Tensor, draws: Draws) -> Tensor:
    """The mean over the experts that a sample has, (B,); 0 without any."""
    count_B = draws.present_BM.sum(1).clamp(min=1)
    return each_RB.where(draws.present_RB, 0.0).sum(0) / count_B


BOUNDS: Mapping[str, Callable[[Draws], Tensor]] = MappingProxyType(
    {
        "elbo": elbo,
        "m_elbo": m_elbo,
        "iwae": iwae,
        "iwae_looser": iwae_looser,
        "dreg_looser": dreg_looser,
    }
)
OWN_DRAWS = ("m_elbo",)  # bounds whose decoders read no other expert's draws
VALUE_OF = MappingProxyType({"dreg_looser": "iwae_looser"})  # whose gradients it estimates


@dataclass(frozen=True)
class MixtureObjective(HeldOut):
    """Maximise a bound of log p(x) of a `MixtureVAE`; labels, if there are any, are not used.

    Attributes:
        problem_type: of the data set; not used.
        bound: one of `BOUNDS`.
        samples: K, draws from each expert.

    Raises:
        ConfigError: an unknown bound, or fewer than one draw.
    """

    uses_labels: ClassVar[bool] = False
    model_type: ClassVar[str] = "mm_moe_mixture_vae"  # of the model that it trains

    problem_type: str = "none"
    bound: str = "dreg_looser"
    samples: int = 30

    def __post_init__(self) -> None:
        if self.bound not in BOUNDS:
            hint = nearest(str(self.bound), list(BOUNDS))
            raise ConfigError(f"unknown objective_config.bound {self.bound!r}; {hint}")
        if isinstance(self.samples, bool) or not isinstance(self.samples, int) or self.samples < 1:
            raise ConfigError(
                f"objective_config.samples ({self.samples!r}) must be a whole number from 1; 30 is "
                "the default."
            )

    def __call__(self, model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor], MixtureOutput]:
        """Return (loss, parts of it for the log, the model's output).

        The loss is this rank's share of minus the mean bound of all ranks' samples that have
        anything; a batch without any gives exactly 0, connected to all weights.
        """
        draws: Draws = model(**batch, run=lambda own: self._draws(own, batch))
        value_B = BOUNDS[self.bound](draws)
        some_B = draws.present_BM.any(1)
        total = (value_B * some_B).sum()
        loss = -total * mean_weight(some_B.sum(), dtype=total.dtype)
        output = MixtureOutput(features={}, losses={}, routing={})
        return loss, {self.bound: loss}, output

    def held_out(self, model: MixtureVAE, batch: Batch) -> dict[str, Tensor]:
        """The bound of each sample that has anything, and minus the bound as "loss".

        Of "dreg_looser" it is the bound whose gradients that estimates. The draws of a sample are
        those of its id, the same in every evaluation.
        """
        shape = (len(model.modalities), self.samples, model.config.latent_size)
        places_B = torch.tensor([_place(name) for name in batch.ids], dtype=torch.int64)
        uniform = uniform_by_place(0, places_B.to(batch.present.device), math.prod(shape))
        draws = model.draw(
            batch.present,
            batch.inputs,
            samples=self.samples,
            cross=self.bound not in OWN_DRAWS,
            uniform_BRKL=uniform.view(len(places_B), *shape),
        )
        name = VALUE_OF.get(self.bound, self.bound)
        value_N = BOUNDS[name](draws)[batch.present.any(1)]
        return {name: value_N, "loss": -value_N}

    def _draws(self, model: MixtureVAE, batch: Batch) -> Draws:
        return model.draw(
            batch.present,
            batch.inputs,
            samples=self.samples,
            cross=self.bound not in OWN_DRAWS,
        )


def _place(name: str) -> int:
    """A hash of a sample's id, with room in int64 for a factor of thousands."""
    digest = hashlib.blake2b(name.encode(), digest_size=8, person=b"mixture draws").digest()
    return int.from_bytes(digest, "big") >> 16
