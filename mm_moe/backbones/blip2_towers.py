"""The towers of BLIP-2, built from the modules of `transformers`' BLIP-2 models.

Axes: N rows, L tokens, S patches, Q query tokens, D width.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_moe.backbones.attention import attend
from mm_moe.backbones.base import Payload, Tower, run_feed_forward
from mm_moe.backbones.block import Attention, BlockTower, TransformerBlock
from mm_moe.backbones.inputs import (
    all_real,
    blank_image,
    check_length,
    check_pixels,
    one_token,
)
from mm_moe.moe.context import TokenContext
from mm_moe.moe.layer import RoutingRecord

OPT_OFFSET = 2  # OPT's first position


def bert_attention(part: Any, core: Any) -> Attention:
    """A BERT-style attention module's projections; `core` is its part with query, key and value."""
    return Attention(
        query=core.query,
        key=core.key,
        value=core.value,
        out=part.output.dense,
        num_heads=core.num_attention_heads,
        dropout=core.attention_dropout,
    )


def qformer_block(layer: Any, *, text: bool) -> TransformerBlock:
    """One Q-Former layer as the queries see it, or as a text sees it.

    Both share the self-attention and have feed-forwards of their own; a text does not look at the
    image.
    """
    inner = layer.intermediate if text else layer.intermediate_query
    outer = layer.output if text else layer.output_query
    cross = None if text or not layer.has_cross_attention else layer.crossattention
    return TransformerBlock(
        attention=bert_attention(layer.attention, layer.attention.attention),
        attention_norm=layer.attention.output.LayerNorm,
        cross=None if cross is None else bert_attention(cross, cross.attention),
        cross_norm=None if cross is None else cross.output.LayerNorm,
        mlp=nn.Sequential(inner.dense, inner.intermediate_act_fn, outer.dense),
        mlp_norm=outer.LayerNorm,
        dropout=outer.dropout.p,
    )


class QFormerImageTower(BlockTower):
    """Blocks of the Q-Former over a vision transformer's patches; payload: pixel_values.

    The query tokens enter block 0; the patches are the memory of the cross-attention. The feature
    is the mean of the projected queries: their contrastive training looks at the closest one of
    them, which needs a text to be close to.

    Args:
        model: a `transformers` BLIP-2 model.
        projection: of the last queries.
        freeze_vision: no gradient for the vision transformer.
        every_query: the feature is all projected queries, each of length 1, side by side
            (N, Q * width of one): what is compared with a text by the closest of them.
    """

    def __init__(
        self,
        model: Any,
        projection: nn.Linear,
        *,
        freeze_vision: bool,
        every_query: bool = False,
    ) -> None:
        layers = model.qformer.encoder.layer
        super().__init__(
            [qformer_block(layer, text=False) for layer in layers],
            width=projection.in_features,
            out_width=projection.out_features,
        )
        self.vision = model.vision_model
        self.query_tokens = model.query_tokens
        self.norm_in, self.dropout_in = model.qformer.layernorm, model.qformer.dropout
        self.projection = projection
        self.image_size: int = model.config.vision_config.image_size
        self.every_query = every_query
        if every_query:
            self.out_width *= self.query_tokens.shape[1]
        if freeze_vision:
            self.vision.requires_grad_(False)

    @property
    def source_width(self) -> int:
        """Width of the patches."""
        return self.vision.config.hidden_size

    def memory(self, payload: Payload) -> Tensor:
        """The patches (N, S, width of the vision transformer) after their last norm."""
        pixels_NCHW = payload["pixel_values"]
        check_pixels(pixels_NCHW, self.image_size)
        return self.vision(pixel_values=pixels_NCHW).last_hidden_state

    def embed(self, payload: Payload) -> tuple[Tensor, None]:
        """The query tokens, once for each image."""
        return self.queries(len(payload["pixel_values"])), None

    def queries(self, num_rows: int) -> Tensor:
        """The query tokens (N, Q, D) that enter block 0."""
        query_1QD = self.dropout_in(self.norm_in(self.query_tokens))
        return query_1QD.expand(num_rows, -1, -1)

    def pool(self, x_NLD: Tensor, payload: Payload, prefix: int) -> Tensor:
        """Mean of the projected queries, or all of them."""
        query_NQD = self.projection(x_NLD[:, prefix:])
        if not self.every_query:
            return query_NQD.mean(1)
        return F.normalize(query_NQD, dim=-1, eps=1e-6).flatten(1)

    def blank(self) -> Payload:
        """One grey image."""
        return blank_image(self.query_tokens, self.image_size)

    def stand_in(self, num_rows: int, length: int) -> Payload:
        """Images of no pixels: `embed` only counts them."""
        return {"pixel_values": self.query_tokens.new_zeros(num_rows, 0)}


class VisionImageTower(Tower):
    """The same computation with the vision transformer's blocks as the blocks of the tower.

    Prompts and experts then act in the vision transformer; the Q-Former is part of the pooling.

    Args:
        inner: the tower to turn round.
    """

    def __init__(self, inner: QFormerImageTower) -> None:
        super().__init__()
        self.inner = inner
        self.width = inner.vision.config.hidden_size
        self.out_width = inner.out_width
        self.num_blocks = len(inner.vision.encoder.layers)
        self.image_size = inner.image_size

    def embed(self, payload: Payload) -> tuple[Tensor, None]:
        """Class token and patches with positions."""
        pixels_NCHW = payload["pixel_values"]
        check_pixels(pixels_NCHW, self.image_size)
        return self.inner.vision.embeddings(pixels_NCHW), None

    def block(
        self,
        index: int,
        x_NLD: Tensor,
        mask_NL: Tensor | None = None,
        keys_values: tuple[Tensor, Tensor] | None = None,
        context: TokenContext | None = None,
        memory: Tensor | None = None,
    ) -> tuple[Tensor, RoutingRecord | None]:
        """One pre-norm block of the vision transformer."""
        layer: Any = self.inner.vision.encoder.layers[index]
        attention = layer.self_attn
        y_NLD = attend(
            *attention.qkv(layer.layer_norm1(x_NLD)).chunk(3, dim=-1),
            num_heads=attention.num_heads,
            extra=keys_values,
            dropout=attention.attention_dropout if self.training else 0.0,
        )
        x_NLD = x_NLD + attention.projection(y_NLD)
        y_NLD, record = run_feed_forward(layer.mlp, layer.layer_norm2(x_NLD), mask_NL, context)
        return x_NLD + y_NLD, record

    def pool(self, x_NLD: Tensor, payload: Payload, prefix: int) -> Tensor:
        """The Q-Former's reading of the tower's own tokens."""
        memory = self.inner.vision.post_layernorm(x_NLD[:, prefix:])
        query_NQD, _ = self.inner.embed(payload)
        for index in range(self.inner.num_blocks):
            query_NQD, _ = self.inner.block(index, query_NQD, memory=memory)
        return self.inner.pool(query_NQD, payload, 0)

    def blank(self) -> Payload:
        """One grey image."""
        return self.inner.blank()

    def stand_in(self, num_rows: int, length: int) -> Payload:
        """Images of no pixels: the Q-Former only counts them."""
        return self.inner.stand_in(num_rows, length)

    def feed_forwards(self) -> list[tuple[nn.Module, str]]:
        """`mlp` of every layer of the vision transformer."""
        return [(layer, "mlp") for layer in self.inner.vision.encoder.layers]


class QFormerTextTower(BlockTower):
    """The Q-Former's text side; payload: input_ids and attention_mask (N, L), right-padded.

    In BLIP-2 queries and texts go through one self-attention. The two towers each have their own,
    from the same weights: every weight has one owner, and either side can be frozen or made sparse
    alone.

    Args:
        model: a `Blip2ForImageTextRetrieval` with text input.
    """

    def __init__(self, model: Any) -> None:
        projection = model.text_projection
        super().__init__(
            [
                copy.deepcopy(qformer_block(layer, text=True))
                for layer in model.qformer.encoder.layer
            ],
            width=projection.in_features,
            out_width=projection.out_features,
        )
        self.token_embedding = model.embeddings.word_embeddings
        self.position_embedding = model.embeddings.position_embeddings
        self.norm_in = copy.deepcopy(model.qformer.layernorm)
        self.dropout_in = nn.Dropout(model.qformer.dropout.p)
        self.projection = projection

    def embed(self, payload: Payload) -> tuple[Tensor, Tensor]:
        """Token plus position embeddings, normalised; the mask is the tokenizer's."""
        ids_NL = payload["input_ids"]
        check_length(ids_NL.shape[1], self.position_embedding.num_embeddings)
        x_NLD = self.token_embedding(ids_NL) + self.position_embedding.weight[: ids_NL.shape[1]]
        return self.dropout_in(self.norm_in(x_NLD)), payload["attention_mask"].bool()

    def pool(self, x_NLD: Tensor, payload: Payload, prefix: int) -> Tensor:
        """The first token, projected."""
        return self.projection(x_NLD[:, prefix])

    def blank(self) -> Payload:
        """A row of one token."""
        return one_token(self.token_embedding.weight.device, token=0)

    def stand_in(self, num_rows: int, length: int) -> Payload:
        """Nothing: the first token is read."""
        return {}


class OptTextTower(BlockTower):
    """BLIP-2's language model as a text tower: OPT's causal blocks, read at the last real token.

    Args:
        decoder: `transformers`' OPTDecoder.
    """

    causal = True

    def __init__(self, decoder: Any) -> None:
        config = decoder.config
        super().__init__(
            [opt_block(layer) for layer in decoder.layers],
            width=config.hidden_size,
            out_width=config.word_embed_proj_dim,
        )
        self.token_embedding = decoder.embed_tokens
        self.position_embedding = decoder.embed_positions
        self.project_in = decoder.project_in or nn.Identity()
        self.norm_out = decoder.final_layer_norm or nn.Identity()
        self.project_out = decoder.project_out or nn.Identity()

    def embed(self, payload: Payload) -> tuple[Tensor, Tensor]:
        """Token plus position embeddings; the mask is the tokenizer's."""
        ids_NL = payload["input_ids"]
        weight = self.position_embedding.weight[OPT_OFFSET:]
        check_length(ids_NL.shape[1], len(weight))
        x_NLD = self.project_in(self.token_embedding(ids_NL)) + weight[: ids_NL.shape[1]]
        return x_NLD, payload["attention_mask"].bool()

    def pool(self, x_NLD: Tensor, payload: Payload, prefix: int) -> Tensor:
        """The last real token, normalised."""
        last_N = payload["attention_mask"].sum(1) - 1 + prefix
        rows_N = torch.arange(len(x_NLD), device=x_NLD.device)
        return self.project_out(self.norm_out(x_NLD[rows_N, last_N]))

    def blank(self) -> Payload:
        """A row of one token."""
        return one_token(self.token_embedding.weight.device, token=0)

    def stand_in(self, num_rows: int, length: int) -> Payload:
        """Texts without padding."""
        return all_real(num_rows, length, self.token_embedding.weight.device)


def opt_block(layer: Any) -> TransformerBlock:
    """One OPT decoder layer."""
    attention = layer.self_attn
    return TransformerBlock(
        attention=Attention(
            query=attention.q_proj,
            key=attention.k_proj,
            value=attention.v_proj,
            out=attention.out_proj,
            num_heads=attention.num_heads,
            dropout=attention.dropout,
        ),
        attention_norm=layer.self_attn_layer_norm,
        mlp=nn.Sequential(layer.fc1, layer.activation_fn, layer.fc2),
        mlp_norm=layer.final_layer_norm,
        norm_first=layer.do_layer_norm_before,
        dropout=layer.dropout,
    )
