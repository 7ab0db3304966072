"""The shared part: from what an expert hands over to a latent vector and back.

N cells, W width of an expert's output, D latent width.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mm_moe.moe.batch_norm import BatchNorm

LEAST_VARIANCE = 1e-4


def wide(values: Tensor) -> Tensor:
    """At least float32: sums over tens of thousands of genes in bf16 would be too coarse."""
    return values if values.dtype == torch.float64 else values.float()


def he_normal(weight: Tensor, *, fan: int) -> None:
    """Draw weights whose variance is 2 / fan."""
    nn.init.normal_(weight, std=(2 / fan) ** 0.5)


def norm_of(kind: str, width: int) -> nn.Module:
    """The normalisation of that name; batch norm as in the source (momentum .01, eps 1e-3)."""
    if kind == "batch":
        return BatchNorm(width, momentum=0.01, eps=1e-3)
    return nn.LayerNorm(width) if kind == "layer" else nn.Identity()


class Block(nn.Module):
    """Stages of Linear, norm, ReLU and dropout.

    Args:
        widths: of the input, and behind each stage.
        norm: see `norm_of`.
        dropout: behind each stage.
    """

    def __init__(self, widths: Sequence[int], *, norm: str = "none", dropout: float = 0.0) -> None:
        super().__init__()
        self.linears = nn.ModuleList(
            nn.Linear(before, behind) for before, behind in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(norm_of(norm, width) for width in widths[1:])
        self.dropout = nn.Dropout(dropout)
        for linear in self.linears:
            assert isinstance(linear, nn.Linear)
            he_normal(linear.weight, fan=linear.out_features)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The output, and what each stage gives before its dropout."""
        hidden = []
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = norm(linear(x)).relu()
            hidden.append(x)
            x = self.dropout(x)
        return x, hidden


@dataclass(frozen=True)
class Posterior:
    """A normal distribution with a diagonal covariance for each cell.

    Attributes:
        mu: (N, D), at least float32.
        logvar: (N, D), likewise.
        hidden: "hidden_i" -> what the i-th hidden layer of the core gave, for adversaries.
    """

    mu: Tensor
    logvar: Tensor
    hidden: dict[str, Tensor]

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """One draw for each cell; `noise` (N, D) is standard normal, by default torch's."""
        noise = torch.randn_like(self.mu) if noise is None else noise.to(self.mu)
        return self.mu + (self.logvar / 2).exp() * noise

    def kl(self, *, free_bits: float = 0.0) -> Tensor:
        """KL divergence (N,) from the standard normal, in nats.

        Args:
            free_bits: nats of each dimension and cell that cost nothing more (Kingma et al. 2016;
                theirs is the mean over a group of cells, which would tie cells to each other).
        """
        each_ND = (self.mu.square() + self.logvar.exp() - 1 - self.logvar) / 2
        return (each_ND.clamp(min=free_bits) if free_bits else each_ND).sum(-1)


class GaussianEncoder(nn.Module):
    """Expert outputs (N, W) to a `Posterior`.

    Args:
        widths: W, then those of the hidden layers.
        latent_size: D.
        norm: of the hidden layers.
    """

    def __init__(self, widths: Sequence[int], *, latent_size: int, norm: str) -> None:
        super().__init__()
        self.block = Block(widths, norm=norm)
        self.mu = nn.Linear(widths[-1], latent_size)
        self.variance = nn.Linear(widths[-1], latent_size)
        for head in (self.mu, self.variance):
            nn.init.normal_(head.weight, std=widths[-1] ** -0.5)
            nn.init.zeros_(head.bias)

    def forward(self, h: Tensor) -> Posterior:
        """The posterior of each row; its variance is at least `LEAST_VARIANCE`."""
        h, hidden = self.block(h)
        logvar = (wide(self.variance(h)).exp() + LEAST_VARIANCE).log()
        names = {f"hidden_{i}": values for i, values in enumerate(hidden)}
        return Posterior(wide(self.mu(h)), logvar, names)


class CoreVAE(nn.Module):
    """The variational autoencoder that all species share.

    Args:
        width: W.
        hidden: widths between W and the latent; mirrored in the decoder, which has no norm.
        latent_size: D.
        norm: of the encoder's hidden layers.
    """

    def __init__(self, *, width: int, hidden: Sequence[int], latent_size: int, norm: str) -> None:
        super().__init__()
        self.encoder = GaussianEncoder([width, *hidden], latent_size=latent_size, norm=norm)
        self.decoder = Block([latent_size, *reversed(hidden), width])

    def decode(self, z: Tensor) -> Tensor:
        """What the experts' decoders get, (N, W)."""
        return self.decoder(z.to(next(self.decoder.parameters()).dtype))[0]
