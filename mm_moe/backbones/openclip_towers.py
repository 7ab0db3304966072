"""The two towers of an `open_clip` model: a vision transformer and the built-in text transformer.

Axes: N rows, L tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from mm_moe.backbones.attention import attend
from mm_moe.backbones.base import Payload, Tower, run_feed_forward
from mm_moe.backbones.block import Attention
from mm_moe.backbones.inputs import (
    blank_image,
    check_length,
    check_pixels,
    ends_last,
    one_token,
)
from mm_moe.moe.context import TokenContext
from mm_moe.moe.layer import RoutingRecord


@dataclass
class TextParts:
    """A text tower's modules, wherever the library's model classes keep them."""

    token_embedding: nn.Embedding
    positional_embedding: nn.Parameter
    blocks: nn.ModuleList
    ln_final: nn.Module
    text_projection: nn.Linear | nn.Parameter
    pool_type: str
    eos_id: int


class OpenClipTower(Tower):
    """The part that both towers share: the library's residual attention blocks."""

    blocks: nn.ModuleList

    def block(
        self,
        index: int,
        x_NLD: Tensor,
        mask_NL: Tensor | None = None,
        keys_values: tuple[Tensor, Tensor] | None = None,
        context: TokenContext | None = None,
        memory: Tensor | None = None,
    ) -> tuple[Tensor, RoutingRecord | None]:
        """One pre-norm block; see `ClipTower.block` for why attention needs no padding mask."""
        block: Any = self.blocks[index]
        y_NLD = block.ln_1(x_NLD)
        if isinstance(block.attn, Attention):
            y_NLD = block.attn(y_NLD, extra=keys_values, causal=self.causal)
        elif keys_values is None:
            order = causal_mask(x_NLD) if self.causal else None
            y_NLD = block.attention(y_NLD, attn_mask=order)
        else:
            y_NLD = self._attend(block.attn, y_NLD, keys_values)
        x_NLD = x_NLD + block.ls_1(y_NLD)
        y_NLD, record = run_feed_forward(block.mlp, block.ln_2(x_NLD), mask_NL, context)
        return x_NLD + block.ls_2(y_NLD), record

    def _attend(
        self, attention: nn.MultiheadAttention, y_NLD: Tensor, extra: tuple[Tensor, Tensor]
    ) -> Tensor:
        joint = F.linear(y_NLD, attention.in_proj_weight, attention.in_proj_bias)
        out_NLD = attend(
            *joint.chunk(3, dim=-1),
            num_heads=attention.num_heads,
            extra=extra,
            causal=self.causal,
        )
        return attention.out_proj(out_NLD)

    def prepare_adapters(self) -> None:
        """Part torch's attention modules, whose weights are read past any adapter."""
        for block in self.blocks:
            block.attn = split_attention(block.attn)  # type: ignore[arg-type]

    def undo_adapters(self) -> None:
        """Join them again."""
        for block in self.blocks:
            block.attn = join_attention(block.attn)  # type: ignore[arg-type]

    def feed_forwards(self) -> list[tuple[nn.Module, str]]:
        """`mlp` of every block."""
        return [(block, "mlp") for block in self.blocks]


class OpenClipImageTower(OpenClipTower):
    """A vision transformer; payload: pixel_values (N, 3, H, W)."""

    def __init__(self, visual: VisionTransformer) -> None:
        super().__init__()
        self.visual = visual
        self.width = visual.transformer.width
        self.out_width = visual.output_dim
        self.num_blocks = visual.transformer.layers
        self.image_size: int = visual.image_size[0]

    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]
        """The library's blocks."""
        return self.visual.transformer.resblocks

    def embed(self, payload: Payload) -> tuple[Tensor, None]:
        """Class token and patches, with positions, normalised."""
        pixels_NCHW = payload["pixel_values"]
        check_pixels(pixels_NCHW, self.image_size)
        return self.visual._embeds(pixels_NCHW.to(self.visual.conv1.weight.dtype)), None

    def pool(self, x_NLD: Tensor, payload: Payload, prefix: int) -> Tensor:
        """The library's pooling of the tower's own tokens, projected."""
        pooled_ND, _ = self.visual._pool(x_NLD[:, prefix:])
        return pooled_ND @ self.visual.proj

    def stand_in(self, num_rows: int, length: int) -> Payload:
        """Nothing: every token is read."""
        return {}

    def anchor(self) -> Tensor:
        """The class token."""
        return self.visual.class_embedding.detach()

    def blank(self) -> Payload:
        """One black image."""
        return blank_image(self.visual.conv1.weight, self.image_size)


class OpenClipTextTower(OpenClipTower):
    """A causal text transformer; payload: input_ids and attention_mask (N, L), right-padded."""

    causal = True

    def __init__(self, text: TextParts) -> None:
        super().__init__()
        self.token_embedding = text.token_embedding
        self.positional_embedding = text.positional_embedding
        self.blocks = text.blocks
        self.ln_final = text.ln_final
        self.text_projection = text.text_projection
        self.pool_type = text.pool_type
        self.eos_id = text.eos_id
        self.width = text.token_embedding.embedding_dim
        projection = text.text_projection
        if isinstance(projection, nn.Linear):
            self.out_width = projection.out_features
        else:
            self.out_width = projection.shape[1]
        self.num_blocks = len(self.blocks)

    def embed(self, payload: Payload) -> tuple[Tensor, Tensor]:
        """Token plus position embeddings; the mask is the tokenizer's."""
        ids_NL = payload["input_ids"]
        length, positions = ids_NL.shape[1], len(self.positional_embedding)
        check_length(length, positions)
        x_NLD = self.token_embedding(ids_NL) + self.positional_embedding[:length]
        return x_NLD, payload["attention_mask"].bool()

    def pool(self, x_NLD: Tensor, payload: Payload, prefix: int) -> Tensor:
        """The end-of-text token, normalised and projected."""
        ids_NL = payload["input_ids"]
        if self.pool_type == "eos":
            end_N = (ids_NL == self.eos_id).int().argmax(-1)
        else:
            end_N = ids_NL.argmax(-1)  # the end mark has the largest id
        rows_N = torch.arange(len(ids_NL), device=ids_NL.device)
        pooled_ND = self.ln_final(x_NLD[rows_N, end_N + prefix])
        if isinstance(self.text_projection, nn.Linear):
            return self.text_projection(pooled_ND)
        return pooled_ND @ self.text_projection

    def stand_in(self, num_rows: int, length: int) -> Payload:
        """Texts that end at their last token."""
        end = self.eos_id if self.pool_type == "eos" else self.token_embedding.num_embeddings - 1
        return {"input_ids": ends_last(num_rows, length, end, self.token_embedding.weight.device)}

    def anchor(self) -> Tensor:
        """The end-of-text token."""
        end = self.eos_id if self.pool_type == "eos" else -1
        return self.token_embedding.weight[end].detach()

    def blank(self) -> Payload:
        """A row of one token."""
        return one_token(self.token_embedding.weight.device)


def split_attention(joint: nn.MultiheadAttention) -> Attention:
    """The same attention with four linear layers; on the meta device, the same shapes."""
    weights = joint.in_proj_weight.detach().chunk(3)
    biases = joint.in_proj_bias.detach().chunk(3)
    parts = []
    for weight, bias in zip(weights, biases, strict=True):
        linear = nn.Linear(joint.embed_dim, joint.embed_dim, device=weight.device)
        if not weight.is_meta:
            linear.weight.data, linear.bias.data = weight.clone(), bias.clone()
        parts.append(linear)
    out = nn.Linear(joint.embed_dim, joint.embed_dim, device=weights[0].device)
    out.weight, out.bias = joint.out_proj.weight, joint.out_proj.bias
    query, key, value = parts
    split = Attention(
        query=query, key=key, value=value, out=out, num_heads=joint.num_heads, dropout=0.0
    )
    return split.train(joint.training)


def join_attention(split: Attention) -> nn.MultiheadAttention:
    """The same attention as torch's module."""
    width = split.out.in_features
    joint = nn.MultiheadAttention(width, split.num_heads, batch_first=True)  # as open_clip does
    parts = (split.query, split.key, split.value)
    joint.in_proj_weight.data = torch.cat([part.weight.detach() for part in parts])
    joint.in_proj_bias.data = torch.cat([part.bias.detach() for part in parts])
    joint.out_proj.weight, joint.out_proj.bias = split.out.weight, split.out.bias
    return joint.train(split.training)


def causal_mask(x_NLD: Tensor) -> Tensor:
    """(L, L), 0 where a token may look and -inf where not."""
    length = x_NLD.shape[1]
    return torch.full((length, length), -torch.inf, device=x_NLD.device).triu(1)
