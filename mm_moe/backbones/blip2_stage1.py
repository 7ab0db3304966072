"""The Q-Former of BLIP-2's first stage: queries and texts in one self-attention, and its passes.

Source: Li et al. 2023, section 3.2. The same layers are run under three masks:

- unimodal: queries see queries, a text sees itself (contrast);
- bi-directional: all see all (matching);
- multimodal causal: queries see queries, a token sees the queries and those before it (generation).

Under the third mask the queries are those of the first, so their keys and values are taken over and
only the text runs again.

Axes: N rows, L tokens of a text, S patches, Q query tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from mm_moe.backbones.base import Payload, Tower, run_feed_forward
from mm_moe.backbones.blip2_towers import QFormerImageTower, qformer_block
from mm_moe.backbones.block import TransformerBlock
from mm_moe.backbones.inputs import all_real, check_length, one_token
from mm_moe.backbones.recompute import recomputed, wants_recompute
from mm_moe.batch import IMAGE, TEXT
from mm_moe.moe.context import TokenContext
from mm_moe.moe.layer import RoutingRecord

BOTH = 3  # the combination "image and text", which all rows of these passes have


class SharedBlock(nn.Module):
    """A Q-Former layer as a text sees it: the queries' self-attention, a feed-forward of its own.

    Args:
        lender: the layer as the queries see it, which owns the self-attention.
        own: the layer as a text sees it, of which the feed-forward is kept.
    """

    def __init__(self, lender: TransformerBlock, own: TransformerBlock) -> None:
        super().__init__()
        self._lender = (lender,)  # in a tuple, so that it is no submodule
        self.mlp, self.mlp_norm, self.dropout = own.mlp, own.mlp_norm, own.dropout

    def forward(
        self,
        x_NLD: Tensor,
        mask_NL: Tensor | None = None,
        extra: tuple[Tensor, Tensor] | None = None,
        context: TokenContext | None = None,
        causal: bool = False,
    ) -> tuple[Tensor, RoutingRecord | None]:
        """Tokens (N, L, D) that leave the block, and the record of a sparse feed-forward."""
        x_NLD = self._lender[0].among_tokens(x_NLD, mask_NL, extra, causal)
        return self.behind_attention(x_NLD, mask_NL, context)

    def behind_attention(
        self, x_NLD: Tensor, mask_NL: Tensor | None, context: TokenContext | None
    ) -> tuple[Tensor, RoutingRecord | None]:
        """The feed-forward; a text does not look at the image."""
        y_NLD, record = run_feed_forward(self.mlp, x_NLD, mask_NL, context)
        return self.mlp_norm(x_NLD + F.dropout(y_NLD, self.dropout, self.training)), record


class SharedTextTower(Tower):
    """The text side of a Q-Former whose self-attention and first norm are the image tower's.

    Payload: input_ids and attention_mask (N, L), right-padded. The feature is the projection of the
    first token.

    Args:
        model: a `Blip2ForImageTextRetrieval` with text input.
        image: the tower that owns what is shared.
    """

    def __init__(self, model: Any, image: QFormerImageTower) -> None:
        super().__init__()
        self._image = (image,)  # in a tuple, so that it is no submodule
        layers, lenders = model.qformer.encoder.layer, image.blocks
        self.blocks = nn.ModuleList(
            SharedBlock(lender, qformer_block(layer, text=True))  # type: ignore[arg-type]
            for lender, layer in zip(lenders, layers, strict=True)
        )
        self.projection = model.text_projection
        self.width, self.out_width = self.projection.in_features, self.projection.out_features
        self.num_blocks = len(layers)
        self.token_embedding = model.embeddings.word_embeddings
        self.position_embedding = model.embeddings.position_embeddings

    def embed(self, payload: Payload) -> tuple[Tensor, Tensor]:
        """Token plus position embeddings, normalised; the mask is the tokenizer's."""
        ids_NL, image = payload["input_ids"], self._image[0]
        check_length(ids_NL.shape[1], self.position_embedding.num_embeddings)
        x_NLD = self.token_embedding(ids_NL) + self.position_embedding.weight[: ids_NL.shape[1]]
        return image.dropout_in(image.norm_in(x_NLD)), payload["attention_mask"].bool()

    def block(
        self,
        index: int,
        x_NLD: Tensor,
        mask_NL: Tensor | None = None,
        keys_values: tuple[Tensor, Tensor] | None = None,
        context: TokenContext | None = None,
        memory: Tensor | None = None,
    ) -> tuple[Tensor, RoutingRecord | None]:
        """One block under the unimodal mask."""
        return self.blocks[index](x_NLD, mask_NL, keys_values, context)

    def pool(self, x_NLD: Tensor, payload: Payload, prefix: int) -> Tensor:
        """The first token, projected."""
        return self.projection(x_NLD[:, prefix])

    def blank(self) -> Payload:
        """A row of one token."""
        return one_token(self.token_embedding.weight.device, token=0)

    def stand_in(self, num_rows: int, length: int) -> Payload:
        """Texts without padding."""
        return all_real(num_rows, length, self.token_embedding.weight.device)

    def feed_forwards(self) -> list[tuple[nn.Module, str]]:
        """`mlp` of every block: the text's own."""
        return [(block, "mlp") for block in self.blocks]


class StageOneHeads(nn.Module):
    """What the first stage reads from the last tokens.

    The language head is BERT's: dense layer, activation, norm, and the word embeddings again with a
    bias for each word. Published checkpoints do not hold it, so it starts anew; the matching head
    is the checkpoint's.

    Args:
        model: a `Blip2ForImageTextRetrieval`.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        config = model.config.qformer_config
        self.itm = model.itm_head
        dense = nn.Linear(config.hidden_size, config.hidden_size)
        nn.init.normal_(dense.weight, std=config.initializer_range)
        nn.init.zeros_(dense.bias)
        norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.transform = nn.Sequential(dense, ACT2FN[config.hidden_act], norm)
        self.word_bias = nn.Parameter(torch.zeros(config.vocab_size))

    def words(self, x_NLD: Tensor, embedding: nn.Embedding) -> Tensor:
        """Logits (N, L, V) of the words that follow."""
        return F.linear(self.transform(x_NLD), embedding.weight, self.word_bias)


@dataclass(frozen=True)
class QueryPass:
    """What the queries were under the unimodal mask.

    Attributes:
        entered: tokens (N, Q, D) that entered each block.
        feature: projected queries (N, Q, width of one), each of length 1.
    """

    entered: Sequence[Tensor]
    feature: Tensor


class StageOnePasses:
    """The passes of one training step, and the routing records of all of them.

    A row that is not real (the blank row of a process without pairs, a negative that does not
    exist) is computed and not routed; its numbers are finite and mean nothing.

    Args:
        image: tower of the queries.
        text: tower of the texts.
        heads: what reads the last tokens.
        recompute_every: see `Backbone.set_recompute`.
    """

    def __init__(
        self,
        image: QFormerImageTower,
        text: SharedTextTower,
        heads: StageOneHeads,
        *,
        recompute_every: int = 0,
    ) -> None:
        self.image, self.text, self.heads = image, text, heads
        self.recompute_every = recompute_every
        self._records: dict[str, list[RoutingRecord]] = defaultdict(list)

    def queries(self, memory_NSD: Tensor, real_N: Tensor) -> QueryPass:
        """The queries' reading of the image."""
        x_NQD, entered = self.image.queries(len(memory_NSD)), []
        mask_NQ = real_N[:, None].expand(x_NQD.shape[:2])
        context = self._context(self.image, real_N)
        for layer in range(self.image.num_blocks):
            entered.append(x_NQD)
            block = self._block(self.image.block, layer)
            x_NQD, record = block(layer, x_NQD, mask_NQ, None, context, memory_NSD)
            self._note(IMAGE, layer, record)
        feature_NQD = F.normalize(self.image.projection(x_NQD), dim=-1, eps=1e-6)
        return QueryPass(entered, feature_NQD)

    def texts(self, payload: Payload, real_N: Tensor) -> Tensor:
        """Features of the texts alone (N, width of one), not normalised."""
        x_NLD, mask_NL = self.text.embed(payload)
        mask_NL = mask_NL & real_N[:, None]
        context = self._context(self.text, real_N)
        for layer in range(self.text.num_blocks):
            block = self._block(self.text.block, layer)
            x_NLD, record = block(layer, x_NLD, mask_NL, None, context)
            self._note(TEXT, layer, record)
        return self.text.pool(x_NLD, payload, 0)

    def match(self, memory_NSD: Tensor, payload: Payload, real_N: Tensor) -> Tensor:
        """Logits (N, 2) of "does not match" and "matches": the mean over the queries."""
        q_NQD = self.image.queries(len(memory_NSD))
        t_NLD, mask_NL = self.text.embed(payload)
        for layer in range(self.image.num_blocks):
            block = self._block(self._joint, layer)
            q_NQD, t_NLD, *records = block(layer, q_NQD, t_NLD, mask_NL, memory_NSD, real_N)
            for name, record in zip((IMAGE, TEXT), records, strict=True):
                self._note(name, layer, record)
        return self.heads.itm(q_NQD).mean(1)

    def _joint(
        self,
        layer: int,
        q_NQD: Tensor,
        t_NLD: Tensor,
        mask_NL: Tensor,
        memory_NSD: Tensor,
        real_N: Tensor,
    ) -> tuple[Tensor, Tensor, RoutingRecord | None, RoutingRecord | None]:
        """One layer under the bi-directional mask."""
        both: TransformerBlock = self.image.blocks[layer]  # type: ignore[assignment]
        own: SharedBlock = self.text.blocks[layer]  # type: ignore[assignment]
        split = [q_NQD.shape[1], t_NLD.shape[1]]
        sees_NL = torch.cat([mask_NL.new_ones(q_NQD.shape[:2]), mask_NL], dim=1)
        x_NLD = both.among_tokens(torch.cat([q_NQD, t_NLD], dim=1), sees_NL)
        q_NQD, t_NLD = x_NLD.split(split, dim=1)
        real_NQ = real_N[:, None].expand(q_NQD.shape[:2])
        context = self._context(self.image, real_N)
        q_NQD, query_record = both.behind_attention(q_NQD, real_NQ, context, memory_NSD)
        context = self._context(self.text, real_N)
        t_NLD, text_record = own.behind_attention(t_NLD, mask_NL & real_N[:, None], context)
        return q_NQD, t_NLD, query_record, text_record

    def words(self, found: QueryPass, payload: Payload, real_N: Tensor, *, start: int) -> Tensor:
        """Logits (N, L, V) of the token behind each token of a text, given the image.

        Args:
            found: the queries of the same rows.
            payload: the texts; their first token gives way to `start`.
            real_N: which rows are real.
            start: token that asks for a text.
        """
        ids_NL = payload["input_ids"].clone()
        ids_NL[:, 0] = start
        x_NLD, mask_NL = self.text.embed({**payload, "input_ids": ids_NL})
        mask_NL = mask_NL & real_N[:, None]
        context = self._context(self.text, real_N)
        for layer in range(self.text.num_blocks):
            block = self._block(self._causal, layer)
            x_NLD, record = block(layer, x_NLD, mask_NL, found.entered[layer], context)
            self._note(TEXT, layer, record)
        return self.heads.words(x_NLD, self.text.token_embedding)

    def _causal(
        self,
        layer: int,
        x_NLD: Tensor,
        mask_NL: Tensor,
        query_NQD: Tensor,
        context: TokenContext,
    ) -> tuple[Tensor, RoutingRecord | None]:
        """One layer of a text under the multimodal causal mask."""
        attention: Any = self.image.blocks[layer].attention
        seen = attention.key(query_NQD), attention.value(query_NQD)
        return self.text.blocks[layer](x_NLD, mask_NL, seen, context, True)

    @property
    def routing(self) -> dict[str, RoutingRecord]:
        """One record for each sparse layer, over the passes that were made."""
        return {name: merged(records) for name, records in self._records.items()}

    def _note(self, modality: str, layer: int, record: RoutingRecord | None) -> None:
        if record is not None:
            self._records[f"{modality}.{layer}"].append(record)

    def _context(self, tower: Tower, real_N: Tensor) -> TokenContext:
        return TokenContext(tower.modality_index, torch.full_like(real_N, BOTH, dtype=torch.long))

    def _block(self, block: Callable[..., Any], layer: int) -> Callable[..., Any]:
        training = self.image.training
        return (
            recomputed(block)
            if wants_recompute(self.recompute_every, layer, training=training)
            else block
        )


def merged(records: Sequence[RoutingRecord]) -> RoutingRecord:
    """One record of several passes through one layer.

    Counts are summed; a loss is the mean over the passes; a metric is the mean over their tokens.
    """
    loads = [record.load_E for record in records if record.load_E is not None]
    one = torch.ones_like(records[0].tokens_E.sum(), dtype=torch.float32)
    tokens = [record.metrics.get("tokens", one) for record in records]
    total = torch.stack(tokens).sum()
    metrics = {
        name: sum(r.metrics[name] * n for r, n in zip(records, tokens, strict=True))
        / total.clamp(min=1)
        for name in records[0].metrics
        if name != "tokens"
    }
    return RoutingRecord(
        torch.stack([record.tokens_E for record in records]).sum(0),
        {
            name: torch.stack([record.losses[name] for record in records]).mean(0)
            for name in records[0].losses
        },
        {**metrics, "tokens": total},
        torch.stack(loads).sum(0) if loads else None,
    )
