"""Contrastive losses tile by tile: the logits of a batch never exist at once.

B samples of this rank, K candidates that are here (all ranks' rows, or one rank's in the ring), D
joint width, b and k rows and columns of a tile. Candidates are packed in one tensor (K, 2 D + 1):
image features, text features, and 1 or 0 for whether the row is a pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mm_moe.training.collectives import num_ranks, shift_rows

EXCLUDED = -1e4  # logit of a row that is in no pair: exp gives exactly 0, and nothing is infinite


@dataclass(frozen=True)
class Tiling:
    """How a loss is taken apart.

    Attributes:
        sigmoid: SigLIP's loss, else CLIP's softmax.
        tile: rows and columns of a tile.
        ring: the candidates are the ranks' own rows, which visit rank after rank.
        first: place of this rank's first row among the candidates.
    """

    sigmoid: bool
    tile: int
    ring: bool = False
    first: int = 0

    @property
    def hops(self) -> int:
        """Sets of candidates that come by."""
        return num_ranks() if self.ring else 1


class Tile(NamedTuple):
    """A rectangle of the logits, and the square within it whose diagonal are pairs."""

    rows: slice
    columns: slice
    own: tuple[slice, slice]


def tiles(num_rows: int, num_columns: int, *, tile: int, first: int | None) -> Iterator[Tile]:
    """All rectangles; `first` is the column of row 0's partner, None where no partner is here."""
    shift = num_columns if first is None else first
    for top in range(0, num_rows, tile):
        bottom = min(top + tile, num_rows)
        for left in range(0, num_columns, tile):
            right = min(left + tile, num_columns)
            start = max(top, left - shift)
            stop = max(start, min(bottom, right - shift))
            own_rows = slice(start - top, stop - top)
            own_columns = slice(start + shift - left, stop + shift - left)
            if first is None:
                own_rows = own_columns = slice(0, 0)
            yield Tile(slice(top, bottom), slice(left, right), (own_rows, own_columns))


def unpacked(keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Image features (K, D), text features (K, D) and whether a row is a pair (K,)."""
    width = keys.shape[1] // 2
    image_KD, text_KD, counts_K1 = keys.split([width, width, 1], dim=1)
    return image_KD, text_KD, counts_K1.detach().squeeze(1)


def tiled_loss(
    image_BD: Tensor,
    text_BD: Tensor,
    counts_B: Tensor,
    keys: Tensor,
    *,
    scale: Tensor,
    bias: Tensor,
    tiling: Tiling,
) -> Tensor:
    """Sum over this rank's pairs of the softmax loss (both directions) or SigLIP's loss.

    It keeps features and one number per row; beside them there is a tile of logits, computed in the
    forward and again in the backward pass. With `tiling.ring` the candidates travel, and so do
    their gradients in the backward pass, which ends with each at home: no rank holds the features
    of more than one other. SigLIP (Zhai et al. 2023, section 3.3) does so for its loss; doing it
    for the softmax with a running log-sum-exp is ours.

    Args:
        image_BD: normalised features.
        text_BD: normalised features.
        counts_B: which rows are pairs, 1 or 0, of the features' type.
        keys: packed candidates (K, 2 D + 1): of all ranks, or in the ring this rank's own.
        scale: inverse temperature (1,).
        bias: added to all logits (1,); the softmax does not see it.
        tiling: how.
    """
    total: Tensor = _TiledLoss.apply(  # type: ignore[no-untyped-call]
        image_BD, text_BD, counts_B, keys, scale, bias, tiling
    )
    return total


class _TiledLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        image_BD: Tensor,
        text_BD: Tensor,
        counts_B: Tensor,
        keys: Tensor,
        scale: Tensor,
        bias: Tensor,
        tiling: Tiling,
    ) -> Tensor:
        queries = [image_BD * scale, text_BD * scale][: 1 if tiling.sigmoid else 2]
        start = 0.0 if tiling.sigmoid else float("-inf")
        partition = [image_BD.new_full((len(image_BD),), start) for _ in queries]
        travelling = keys
        for hop in range(tiling.hops):
            travelling = shift_rows(travelling) if hop else travelling
            first = None if hop else tiling.first
            for direction, query_BD in enumerate(queries):
                _partition(
                    query_BD, travelling, bias, partition[direction], direction, tiling, first
                )
        ctx.save_for_backward(image_BD, text_BD, counts_B, keys, scale, bias, *partition)
        ctx.tiling = tiling
        each_B = partition[0]
        if not tiling.sigmoid:
            own_B = (queries[0] * text_BD).sum(1) + bias
            # each difference first: the sums are large where the differences are small
            each_B = (partition[0] - own_B) + (partition[1] - own_B)
        return (each_B * counts_B).sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        image_BD, text_BD, counts_B, keys, scale, bias, *partition = ctx.saved_tensors
        tiling: Tiling = ctx.tiling
        queries = [image_BD, text_BD][: len(partition)]
        asked = [torch.zeros_like(query_BD) for query_BD in queries]  # gradients / scale
        grad_keys, grad_bias = torch.zeros_like(keys), torch.zeros_like(bias)
        for hop in range(tiling.hops):
            if hop:
                both = shift_rows(torch.cat([keys, grad_keys], dim=1))
                keys, grad_keys = (part.contiguous() for part in both.chunk(2, dim=1))
            first = None if hop else tiling.first
            for direction, query_BD in enumerate(queries):
                grad_bias += _gradients(
                    query_BD * scale,
                    keys,
                    bias,
                    partition[direction],
                    counts_B * grad,
                    (asked[direction], _side(grad_keys, direction)),
                    direction,
                    tiling,
                    first,
                )
        if tiling.hops > 1:
            grad_keys = shift_rows(grad_keys)  # home again
        grad_scale = torch.zeros_like(scale)
        for asked_BD, query_BD in zip(asked, queries, strict=True):
            grad_scale += (asked_BD * query_BD).sum()
        grads = [asked_BD.mul_(scale) for asked_BD in asked] + [None] * (2 - len(asked))
        return (*grads, None, grad_keys, grad_scale, grad_bias, None)


def _partition(
    query_BD: Tensor,
    keys: Tensor,
    bias: Tensor,
    partition_B: Tensor,
    direction: int,
    tiling: Tiling,
    first: int | None,
) -> None:
    """Add these candidates to each row's log-partition value, or to its loss if sigmoid."""
    key_KD, counts_K = _side(keys, direction), keys[:, -1]
    for part in tiles(len(query_BD), len(keys), tile=tiling.tile, first=first):
        logits_bk = _logits(query_BD, key_KD, counts_K, bias, part)
        rows_b = partition_B[part.rows]
        if tiling.sigmoid:
            logits_bk[part.own].diagonal().neg_()  # now every entry is one that should be small
            rows_b -= F.logsigmoid(logits_bk.neg_()) @ counts_K[part.columns]
        else:
            rows_b.copy_(torch.logaddexp(rows_b, logits_bk.logsumexp(1)))


def _gradients(
    query_BD: Tensor,
    keys: Tensor,
    bias: Tensor,
    partition_B: Tensor,
    weight_B: Tensor,
    into: tuple[Tensor, Tensor],
    direction: int,
    tiling: Tiling,
    first: int | None,
) -> Tensor:
    """Add the gradients of query (without its scale) and candidates; returns that of the bias."""
    key_KD, counts_K = _side(keys, direction), keys[:, -1]
    grad_query_BD, grad_key_KD = into
    grad_bias = torch.zeros_like(bias)
    for part in tiles(len(query_BD), len(keys), tile=tiling.tile, first=first):
        delta_bk = _logits(query_BD, key_KD, counts_K, bias, part)
        own_b = delta_bk[part.own].diagonal()
        if tiling.sigmoid:
            own_b.neg_()
            delta_bk.sigmoid_()
            own_b.neg_()
        else:
            delta_bk.sub_(partition_B[part.rows, None]).exp_()
            own_b.sub_(1)
        delta_bk.mul_(counts_K[part.columns]).mul_(weight_B[part.rows, None])
        grad_bias += delta_bk.sum()
        grad_query_BD[part.rows].addmm_(delta_bk, key_KD[part.columns])
        grad_key_KD[part.columns].addmm_(delta_bk.T, query_BD[part.rows])
    return grad_bias


def _side(keys: Tensor, direction: int) -> Tensor:
    """What a direction asks, a view (K, D): images (direction 0) ask texts, texts ask images."""
    width = keys.shape[1] // 2
    return keys[:, width : 2 * width] if direction == 0 else keys[:, :width]


def _logits(query_BD: Tensor, key_KD: Tensor, counts_K: Tensor, bias: Tensor, part: Tile) -> Tensor:
    """Logits (b, k) of a tile; those of candidates that are no pairs are `EXCLUDED`."""
    logits_bk = query_BD[part.rows] @ key_KD[part.columns].T
    return logits_bk.add_(bias).masked_fill_(counts_K[part.columns] == 0, EXCLUDED)
