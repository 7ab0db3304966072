"""Attention over all tokens of a sequence, of which some may not be looked at.

Axes: Q sequences, T tokens, H width, A heads, D width of a head.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class MaskedAttention(nn.Module):
    """Multi-head self-attention with a key mask; queries, keys and values without bias.

    Args:
        width: H.
        num_heads: A, which divides H.
        dropout: of the attention weights in training.
    """

    def __init__(self, width: int, *, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.mix = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x_QTH: Tensor, keep_QT: Tensor) -> Tensor:
        """Attended tokens (Q, T, H); where a row keeps no token, finite and without meaning."""
        keep_QT = keep_QT | ~keep_QT.any(-1, keepdim=True)
        query, key, value = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.mix(x_QTH).chunk(3, -1)
        )
        y_QATD = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=keep_QT[:, None, None],
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out(y_QATD.transpose(1, 2).flatten(2))
