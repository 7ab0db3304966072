"""A transformer block in parts, for libraries whose own layers hide the feed-forward.

BERT, the Q-Former, OPT and T5 spread a feed-forward over modules that also add the residual or
normalise. Here the library's linear layers and norms are put together again so that the
feed-forward is one module, which a sparse layer can replace, and attention takes extra keys.

Axes: N rows, L tokens, S tokens of the memory, D width, H heads.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from mm_moe.backbones.attention import attend
from mm_moe.backbones.base import Tower, run_feed_forward
from mm_moe.moe.context import TokenContext
from mm_moe.moe.layer import RoutingRecord


class Attention(nn.Module):
    """Four projections around attention.

    Args:
        query: D -> D.
        key: from the width of the memory, or D.
        value: likewise.
        out: D -> D.
        num_heads: attention heads.
        dropout: of the attention weights.
        scale: of the scores; None: 1 / sqrt(width of a head).
    """

    def __init__(
        self,
        *,
        query: nn.Linear,
        key: nn.Linear,
        value: nn.Linear,
        out: nn.Linear,
        num_heads: int,
        dropout: float,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = query, key, value, out
        self.num_heads, self.dropout, self.scale = num_heads, dropout, scale

    def forward(
        self,
        x_NLD: Tensor,
        *,
        memory: Tensor | None = None,
        mask_NL: Tensor | None = None,
        extra: tuple[Tensor, Tensor] | None = None,
        causal: bool = False,
        bias_1HLL: Tensor | None = None,
    ) -> Tensor:
        """Self-attention (N, L, D), or attention to `memory` (N, S, its width)."""
        source = x_NLD if memory is None else memory
        out_NLD = attend(
            self.query(x_NLD),
            self.key(source),
            self.value(source),
            num_heads=self.num_heads,
            extra=extra,
            mask_NL=mask_NL,
            causal=causal,
            dropout=self.dropout if self.training else 0.0,
            scale=self.scale,
            bias_1HQL=bias_1HLL,
        )
        return self.out(out_NLD)


class TransformerBlock(nn.Module):
    """Self-attention, attention to a memory if it has one, and the feed-forward `mlp`.

    Args:
        attention: to the block's own tokens.
        attention_norm: its norm.
        mlp: the feed-forward, without dropout behind it.
        mlp_norm: its norm.
        norm_first: norms stand before the parts (OPT, T5), not behind the residual sums (BERT).
        dropout: of every part's output.
        cross: attention to the memory, only where norms stand behind.
        cross_norm: its norm.
    """

    def __init__(
        self,
        *,
        attention: Attention,
        attention_norm: nn.Module,
        mlp: nn.Module,
        mlp_norm: nn.Module,
        norm_first: bool = False,
        dropout: float = 0.0,
        cross: Attention | None = None,
        cross_norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.attention, self.attention_norm = attention, attention_norm
        self.cross, self.cross_norm = cross, cross_norm
        self.mlp, self.mlp_norm = mlp, mlp_norm
        self.norm_first, self.dropout = norm_first, dropout

    def forward(
        self,
        x_NLD: Tensor,
        mask_NL: Tensor | None = None,
        extra: tuple[Tensor, Tensor] | None = None,
        context: TokenContext | None = None,
        memory: Tensor | None = None,
        causal: bool = False,
        bias_1HLL: Tensor | None = None,
    ) -> tuple[Tensor, RoutingRecord | None]:
        """Tokens (N, L, D) that leave the block, and the record of a sparse feed-forward."""
        if self.norm_first:
            y_NLD = self.attention(
                self.attention_norm(x_NLD),
                mask_NL=mask_NL,
                extra=extra,
                causal=causal,
                bias_1HLL=bias_1HLL,
            )
            x_NLD = x_NLD + self._drop(y_NLD)
            y_NLD, record = run_feed_forward(self.mlp, self.mlp_norm(x_NLD), mask_NL, context)
            return x_NLD + self._drop(y_NLD), record
        x_NLD = self.among_tokens(x_NLD, mask_NL, extra, causal)
        return self.behind_attention(x_NLD, mask_NL, context, memory)

    def among_tokens(
        self,
        x_NLD: Tensor,
        mask_NL: Tensor | None = None,
        extra: tuple[Tensor, Tensor] | None = None,
        causal: bool = False,
    ) -> Tensor:
        """Self-attention, residual sum and norm, where norms stand behind."""
        y_NLD = self.attention(x_NLD, mask_NL=mask_NL, extra=extra, causal=causal)
        return self.attention_norm(x_NLD + self._drop(y_NLD))

    def behind_attention(
        self,
        x_NLD: Tensor,
        mask_NL: Tensor | None = None,
        context: TokenContext | None = None,
        memory: Tensor | None = None,
    ) -> tuple[Tensor, RoutingRecord | None]:
        """The memory and the feed-forward, where norms stand behind."""
        if self.cross is not None and self.cross_norm is not None:
            x_NLD = self.cross_norm(x_NLD + self._drop(self.cross(x_NLD, memory=memory)))
        y_NLD, record = run_feed_forward(self.mlp, x_NLD, mask_NL, context)
        return self.mlp_norm(x_NLD + self._drop(y_NLD)), record

    def _drop(self, y_NLD: Tensor) -> Tensor:
        return F.dropout(y_NLD, self.dropout, self.training)


class BlockTower(Tower):
    """A tower whose blocks are all `TransformerBlock`s."""

    def __init__(self, blocks: list[TransformerBlock], *, width: int, out_width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.width, self.out_width, self.num_blocks = width, out_width, len(blocks)

    def block(
        self,
        index: int,
        x_NLD: Tensor,
        mask_NL: Tensor | None = None,
        keys_values: tuple[Tensor, Tensor] | None = None,
        context: TokenContext | None = None,
        memory: Tensor | None = None,
    ) -> tuple[Tensor, RoutingRecord | None]:
        """One block; the mask hides padding from attention and from a sparse feed-forward."""
        return self.blocks[index](x_NLD, mask_NL, keys_values, context, memory, self.causal)

    def feed_forwards(self) -> list[tuple[nn.Module, str]]:
        """`mlp` of every block."""
        return [(block, "mlp") for block in self.blocks]
