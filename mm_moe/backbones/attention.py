"""Attention with extra keys and values, for prompts that act inside a block.

Axes: N rows, Q queries, L keys, P extra pairs, D width, H heads, K width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(
    query_NQD: Tensor,
    key_NLD: Tensor,
    value_NLD: Tensor,
    *,
    num_heads: int,
    extra: tuple[Tensor, Tensor] | None = None,
    mask_NL: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    scale: float | None = None,
    bias_1HQL: Tensor | None = None,
) -> Tensor:
    """Attention (N, Q, D), before its output projection, over P extra pairs and L own keys.

    Every query sees all extra pairs; of the own keys only the real ones and, in a causal tower,
    those up to itself. A row without any real key, the blank one, sees all of them: its numbers
    mean nothing but must be finite.

    Args:
        query_NQD: projected queries.
        key_NLD: projected keys; in a causal tower as many as queries.
        value_NLD: projected values.
        num_heads: H.
        extra: keys and values (N, P, D), taken as they are.
        mask_NL: which of the own keys are real; None means all.
        causal: whether the tower is causal.
        dropout: of the attention weights.
        scale: of the scores; None: 1 / sqrt(K).
        bias_1HQL: added to the scores of the own keys.
    """
    num_rows, length, width = query_NQD.shape
    num_extra = 0
    if extra is not None:
        num_extra = extra[0].shape[1]
        key_NLD = torch.cat([extra[0].to(key_NLD.dtype), key_NLD], dim=1)
        value_NLD = torch.cat([extra[1].to(value_NLD.dtype), value_NLD], dim=1)

    def heads(x: Tensor) -> Tensor:
        return x.view(num_rows, x.shape[1], num_heads, width // num_heads).transpose(1, 2)

    mask = score_mask(
        query_NQD, num_extra=num_extra, mask_NL=mask_NL, causal=causal, bias_1HQL=bias_1HQL
    )
    out_NHQK = F.scaled_dot_product_attention(
        heads(query_NQD),
        heads(key_NLD),
        heads(value_NLD),
        attn_mask=mask,
        dropout_p=dropout,
        scale=scale,
    )
    return out_NHQK.transpose(1, 2).reshape(num_rows, length, width)


def score_mask(
    query_NQD: Tensor,
    *,
    num_extra: int,
    mask_NL: Tensor | None,
    causal: bool,
    bias_1HQL: Tensor | None,
) -> Tensor | None:
    """Which keys a query sees (bool) or, with a bias, what is added to their scores; None: all."""
    allowed = None
    if causal:
        length = query_NQD.shape[1]
        allowed = torch.ones(
            length, num_extra + length, dtype=torch.bool, device=query_NQD.device
        ).tril(diagonal=num_extra)
    if mask_NL is not None:
        real_NL = F.pad(mask_NL | ~mask_NL.any(1, keepdim=True), (num_extra, 0), value=True)
        real_N11L = real_NL[:, None, None]
        allowed = real_N11L if allowed is None else allowed & real_N11L
    if bias_1HQL is None:
        return allowed
    bias = F.pad(bias_1HQL, (num_extra, 0)).to(query_NQD.dtype)
    return bias if allowed is None else bias.masked_fill(~allowed, -torch.inf)
