"""The expert of one species: the only part that knows its genes.

N cells, G genes of the species, H width next to the genes, W width of what the core gets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_moe.cells.core import Block, he_normal, norm_of, wide
from mm_moe.cells.counts import TARGET_SUM, GeneRows
from mm_moe.cells.likelihoods import nb_loss, squared_error, zinb_log_prob

START_OF_LOG_VALUES = -3.0  # softplus(-3) = .05: most genes of a cell are silent


@dataclass(frozen=True)
class Generated:
    """What a decoder says of some cells.

    Attributes:
        values: expected log-normalised values (N, G), for "mse"; else None.
        log_share: logarithm of each gene's share of the counts (N, G), but for "mse".
        zero_logits: of the zero inflation (N, G); None without it.
    """

    values: Tensor | None = None
    log_share: Tensor | None = None
    zero_logits: Tensor | None = None

    @cached_property
    def profile(self) -> Tensor:
        """Expected log-normalised values (N, G), what the encoder reads of a real cell."""
        if self.log_share is None:
            assert self.values is not None
            return self.values
        return torch.log1p(TARGET_SUM * self.log_share.exp())


class SpeciesExpert(nn.Module):
    """Encoder and decoder of one species.

    Matrices next to the genes have the genes first, and may have more rows than there are genes:
    what stands behind is never read (see `PlacedExperts`).

    Args:
        num_genes: G.
        hidden: widths between G and W, the first is H; mirrored in the decoder.
        width: W.
        norm: of the encoder; the decoder has none.
        dropout: of the encoder.
        likelihood: "mse", "nb" or "zinb".
    """

    def __init__(
        self,
        num_genes: int,
        *,
        hidden: Sequence[int],
        width: int,
        norm: str,
        dropout: float,
        likelihood: str,
    ) -> None:
        super().__init__()
        self.num_genes, self.likelihood = num_genes, likelihood
        first = hidden[0]
        self.read = nn.Parameter(torch.empty(num_genes, first))
        self.read_bias = nn.Parameter(torch.zeros(first))
        self.read_norm = norm_of(norm, first)
        self.dropout = nn.Dropout(dropout)
        self.encoder = Block([*hidden, width], norm=norm, dropout=dropout)
        self.decoder = Block([width, *reversed(hidden)])
        self.write = nn.Parameter(torch.empty(num_genes, first))
        self.write_bias = nn.Parameter(torch.zeros(num_genes))
        he_normal(self.read, fan=first)
        he_normal(self.write, fan=num_genes)
        self.log_theta: nn.Parameter | None = None
        self.zero: nn.Parameter | None = None
        self.zero_bias: nn.Parameter | None = None
        if likelihood == "mse":
            nn.init.constant_(self.write_bias, START_OF_LOG_VALUES)
        else:
            self.log_theta = nn.Parameter(torch.zeros(num_genes))
        if likelihood == "zinb":
            self.zero = nn.Parameter(torch.empty(num_genes, first))
            self.zero_bias = nn.Parameter(torch.full((num_genes,), START_OF_LOG_VALUES))
            he_normal(self.zero, fan=num_genes)

    def encode(self, profile: Tensor) -> Tensor:
        """What the core gets of log-normalised values (N, G): (N, W)."""
        h = profile.to(self.read.dtype) @ self.read[: self.num_genes] + self.read_bias
        return self.encoder(self.dropout(self.read_norm(h).relu()))[0]

    def decode(self, d: Tensor) -> Generated:
        """What the counts of cells may be, from what the core gives (N, W)."""
        h, genes = self.decoder(d)[0], slice(0, self.num_genes)
        logits = wide(F.linear(h, self.write[genes], self.write_bias[genes]))
        if self.likelihood == "mse":
            return Generated(F.softplus(logits))
        log_share = logits.log_softmax(-1)
        if self.zero is None or self.zero_bias is None:
            return Generated(log_share=log_share)
        zero_logits = wide(F.linear(h, self.zero[genes], self.zero_bias[genes]))
        return Generated(log_share=log_share, zero_logits=zero_logits)

    def loss(self, said: Generated, rows: GeneRows) -> Tensor:
        """Reconstruction loss (N,) of each cell: the sum over genes.

        The squared error of log-normalised values, or the negative log-likelihood of the counts
        given their sum.

        Args:
            said: by the decoder.
            rows: the cells.
        """
        if said.log_share is None or self.log_theta is None:
            return squared_error(said.profile, rows.profile)
        log_theta = wide(self.log_theta[: self.num_genes])
        if said.zero_logits is None:
            return nb_loss(rows, said.log_share, log_theta)
        log_mean = said.log_share + rows.sum_N.clamp(min=1).log().unsqueeze(1)
        return -zinb_log_prob(rows.counts, log_mean, log_theta, said.zero_logits).sum(-1)
