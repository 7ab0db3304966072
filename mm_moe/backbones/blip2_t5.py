"""The encoder of a T5 as a text tower.

Axes: N rows, L tokens, D width, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.t5.modeling_t5 import T5Attention

from mm_moe.backbones.base import Payload
from mm_moe.backbones.block import Attention, BlockTower, TransformerBlock
from mm_moe.backbones.inputs import all_real, one_token
from mm_moe.moe.context import TokenContext
from mm_moe.moe.layer import RoutingRecord

TRAINED_LENGTH = 512  # T5's; its relative positions have no end


class T5TextTower(BlockTower):
    """T5's encoder over the text alone; payload: input_ids and attention_mask (N, L), right-padded.

    The feature is the mean of the real tokens after the last norm, as in Sentence-T5 (Ni et al.
    2021). The decoder is left out: it puts out words one after the other, from a start mark that
    all rows share, and has nothing of its own to say about a text that it does not continue. The
    library feeds the encoder projected queries before the text; here the image has a tower and a
    feature of its own, so that either can be missing.

    T5 knows positions only as distances within attention. Tokens that a prompt puts in front
    stand where the text would have begun: they are as far from a word as they are tokens before it,
    as in prompt tuning (Lester et al. 2021), and distances among the words stay. Extra keys and
    values have no distance, and their scores get no bias.

    Args:
        encoder: `transformers`' T5Stack.

    Dropout between a feed-forward's two products is left out, as experts have none.
    """

    def __init__(self, encoder: Any) -> None:
        config = encoder.config
        super().__init__(
            [t5_block(block) for block in encoder.block],
            width=config.d_model,
            out_width=config.d_model,
        )
        self.token_embedding = encoder.embed_tokens
        self.distance_bias = encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        self.max_distance: int = config.relative_attention_max_distance
        self.norm_out = encoder.final_layer_norm
        self.dropout = nn.Dropout(config.dropout_rate)

    def embed(self, payload: Payload) -> tuple[Tensor, Tensor]:
        """Token embeddings; the mask is the tokenizer's."""
        x_NLD = self.token_embedding(payload["input_ids"])
        return self.dropout(x_NLD), payload["attention_mask"].bool()

    def block(
        self,
        index: int,
        x_NLD: Tensor,
        mask_NL: Tensor | None = None,
        keys_values: tuple[Tensor, Tensor] | None = None,
        context: TokenContext | None = None,
        memory: Tensor | None = None,
    ) -> tuple[Tensor, RoutingRecord | None]:
        """One block, with the biases of block 0 as in the library."""
        bias_1HLL = self.biases(x_NLD.shape[1])
        return self.blocks[index](x_NLD, mask_NL, keys_values, context, bias_1HLL=bias_1HLL)

    def biases(self, length: int) -> Tensor:
        """What the distance from a token (row) to another (column) adds to its score."""
        place_L = torch.arange(length, device=self.distance_bias.weight.device)
        bucket_LL = T5Attention._relative_position_bucket(
            place_L - place_L[:, None],
            num_buckets=self.distance_bias.num_embeddings,
            max_distance=self.max_distance,
        )
        return self.distance_bias(bucket_LL).permute(2, 0, 1)[None]

    def pool(self, x_NLD: Tensor, payload: Payload, prefix: int) -> Tensor:
        """Mean of the real tokens of the tower's own, normalised."""
        own_NLD = self.dropout(self.norm_out(x_NLD[:, prefix:]))
        real_NL1 = payload["attention_mask"][..., None].to(own_NLD.dtype)
        return (own_NLD * real_NL1).sum(1) / real_NL1.sum(1)

    def blank(self) -> Payload:
        """A row of one token."""
        return one_token(self.token_embedding.weight.device)

    def stand_in(self, num_rows: int, length: int) -> Payload:
        """Texts without padding."""
        return all_real(num_rows, length, self.token_embedding.weight.device)


def t5_block(block: Any) -> TransformerBlock:
    """One layer of T5's encoder; its feed-forward may be gated."""
    first, second = block.layer
    attention, feed_forward = first.SelfAttention, second.DenseReluDense
    feed_forward.dropout.p = 0.0
    return TransformerBlock(
        attention=Attention(
            query=attention.q,
            key=attention.k,
            value=attention.v,
            out=attention.o,
            num_heads=attention.n_heads,
            dropout=attention.dropout,
            scale=attention.scaling,
        ),
        attention_norm=first.layer_norm,
        mlp=feed_forward,
        mlp_norm=second.layer_norm,
        norm_first=True,
        dropout=first.dropout.p,
    )
