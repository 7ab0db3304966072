"""Attention with extra keys and values, for prompts that act inside a block.

Axes: N rows, L tokens, P extra pairs, D width, H heads, K width of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend_with_extra(
    query_NLD: Tensor,
    key_NLD: Tensor,
    value_NLD: Tensor,
    extra: tuple[Tensor, Tensor],
    *,
    num_heads: int,
    causal: bool,
    dropout: float = 0.0,
) -> Tensor:
    """Attention (N, L, D), before its output projection, over P extra pairs and the L own ones.

    Every token sees all extra pairs; in a causal tower, of the own ones only those up to itself.

    Args:
        query_NLD: projected queries.
        key_NLD: projected keys.
        value_NLD: projected values.
        extra: keys and values (N, P, D), taken as they are.
        num_heads: H.
        causal: whether the tower is causal.
        dropout: of the attention weights.
    """
    num_rows, length, width = query_NLD.shape
    num_extra = extra[0].shape[1]

    def heads(x: Tensor) -> Tensor:
        return x.view(num_rows, -1, num_heads, width // num_heads).transpose(1, 2)

    allowed = None
    if causal:
        allowed = torch.ones(
            length, num_extra + length, dtype=torch.bool, device=query_NLD.device
        ).tril(diagonal=num_extra)
    out_NHLK = F.scaled_dot_product_attention(
        heads(query_NLD),
        heads(torch.cat([extra[0].to(key_NLD.dtype), key_NLD], dim=1)),
        heads(torch.cat([extra[1].to(value_NLD.dtype), value_NLD], dim=1)),
        attn_mask=allowed,
        dropout_p=dropout,
    )
    return out_NHLK.transpose(1, 2).reshape(num_rows, length, width)
