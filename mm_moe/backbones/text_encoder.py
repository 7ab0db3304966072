"""A pretrained text encoder of BERT's kind as a text tower: BERT, RoBERTa, XLM-RoBERTa, MiniLM.

Axes: N rows, L tokens, D width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import (
    AutoConfig,
    BertConfig,
    BertModel,
    RobertaConfig,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from mm_moe.backbones.base import Backbone, Payload, ProcessorNeeds
from mm_moe.backbones.block import Attention, BlockTower, TransformerBlock
from mm_moe.backbones.inputs import all_real, check_length, one_token
from mm_moe.backbones.library import (
    check_same_settings,
    first_line,
    json_fields,
    library_config,
    read_library_model,
)
from mm_moe.batch import TEXT
from mm_moe.errors import CheckpointError, ConfigError
from mm_moe.registry import nearest

KINDS: dict[str, tuple[Any, Any]] = {
    "bert": (BertConfig, BertModel),
    "roberta": (RobertaConfig, RobertaModel),
    "xlm-roberta": (XLMRobertaConfig, XLMRobertaModel),
}
POOLINGS = ("mean", "first")


class EncoderTextTower(BlockTower):
    """A BERT-style encoder; payload: input_ids and attention_mask (N, L), right-padded.

    Args:
        encoder: the library's model.
        pooling: "mean" of the real tokens (sentence encoders) or the "first" token.
    """

    def __init__(self, encoder: Any, *, pooling: str) -> None:
        config = encoder.config
        blocks = [encoder_block(layer) for layer in encoder.encoder.layer]
        super().__init__(blocks, width=config.hidden_size, out_width=config.hidden_size)
        # The embedding's modules without the embedding: it has buffers that no checkpoint holds.
        self.token_embedding = encoder.embeddings.word_embeddings
        self.position_embedding = encoder.embeddings.position_embeddings
        self.type_embedding = encoder.embeddings.token_type_embeddings
        self.norm_in = encoder.embeddings.LayerNorm
        self.dropout_in = nn.Dropout(config.hidden_dropout_prob)
        self.first_position = first_position(config)
        self.pooling = pooling

    def embed(self, payload: Payload) -> tuple[Tensor, Tensor]:
        """Token, position and first type embeddings, normalised; the mask is the tokenizer's."""
        ids_NL = payload["input_ids"]
        position_LD = self.position_embedding.weight[self.first_position :]
        check_length(ids_NL.shape[1], len(position_LD))
        x_NLD = self.token_embedding(ids_NL) + self.type_embedding.weight[0]
        x_NLD = self.norm_in(x_NLD + position_LD[: ids_NL.shape[1]])
        return self.dropout_in(x_NLD), payload["attention_mask"].bool()

    def pool(self, x_NLD: Tensor, payload: Payload, prefix: int) -> Tensor:
        """Mean of the real tokens of the tower's own, or the first of them."""
        if self.pooling == "first":
            return x_NLD[:, prefix]
        real_NL1 = payload["attention_mask"][..., None].to(x_NLD.dtype)
        return (x_NLD[:, prefix:] * real_NL1).sum(1) / real_NL1.sum(1)

    def blank(self) -> Payload:
        """A row of one token."""
        return one_token(self.token_embedding.weight.device)

    def stand_in(self, num_rows: int, length: int) -> Payload:
        """Texts without padding."""
        return all_real(num_rows, length, self.token_embedding.weight.device)


def encoder_block(layer: Any) -> TransformerBlock:
    """One BERT layer."""
    core, output = getattr(layer.attention, "self"), layer.attention.output  # noqa: B009
    return TransformerBlock(
        attention=Attention(
            query=core.query,
            key=core.key,
            value=core.value,
            out=output.dense,
            num_heads=core.num_attention_heads,
            dropout=core.dropout.p,
        ),
        attention_norm=output.LayerNorm,
        mlp=nn.Sequential(
            layer.intermediate.dense, layer.intermediate.intermediate_act_fn, layer.output.dense
        ),
        mlp_norm=layer.output.LayerNorm,
        dropout=output.dropout.p,
    )


def first_position(config: Any) -> int:
    """Where positions start: RoBERTa counts from behind its padding token."""
    return 0 if config.model_type == "bert" else config.pad_token_id + 1


def split_settings(settings: dict[str, Any]) -> tuple[str, Any]:
    """The pooling, and the library's config.

    Raises:
        ConfigError: an encoder of another kind, an unknown pooling, or wrong fields.
    """
    fields = dict(settings)
    pooling, kind = fields.pop("pooling", POOLINGS[0]), fields.pop("model_type", "bert")
    if pooling not in POOLINGS:
        raise ConfigError(
            f"backbone_config.pooling {pooling!r} is unknown; {nearest(pooling, list(POOLINGS))}"
        )
    if kind not in KINDS:
        raise ConfigError(
            f"a text encoder of type {kind!r} is not supported; known: {', '.join(KINDS)}."
        )
    return pooling, library_config(KINDS[kind][0], fields)


class TextEncoderBackbone(Backbone):
    """A text tower alone, to combine with an image tower in `dual`, or for texts alone.

    Args:
        settings: "model_type" (default "bert"), "pooling" ("mean", the default, or "first"), and
            the fields of the encoder's config.
        modalities: ("text",).
        encoder: a ready model to take apart instead of a new random one.
    """

    supported = (TEXT,)

    def __init__(
        self,
        settings: dict[str, Any],
        *,
        modalities: tuple[str, ...] = (TEXT,),
        encoder: Any = None,
    ) -> None:
        super().__init__(settings, modalities=modalities)
        pooling, config = split_settings(settings)
        if encoder is None:
            encoder = KINDS[config.model_type][1](config, add_pooling_layer=False)
        self.set_towers({TEXT: EncoderTextTower(encoder, pooling=pooling)})

    @classmethod
    def processor_needs(cls, settings: dict[str, Any]) -> ProcessorNeeds:
        """Sizes from the config; a tokenizer must come with the weights."""
        _, config = split_settings(settings)
        return ProcessorNeeds(
            max_text_tokens=config.max_position_embeddings - first_position(config),
            vocab_size=config.vocab_size,
        )

    @classmethod
    def load(
        cls, pretrained: str, *, settings: dict[str, Any], modalities: tuple[str, ...]
    ) -> TextEncoderBackbone:
        """Read an encoder from a folder or the Hub; its own config replaces `settings`.

        Raises:
            ConfigError: an encoder of another kind, or `settings` that say something else.
            CheckpointError: nothing readable under that name.
        """
        try:
            kind = AutoConfig.from_pretrained(pretrained, trust_remote_code=False).model_type
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"no text encoder could be read from {pretrained!r} ({first_line(error)}); give a "
                "folder with config.json and model.safetensors, or a Hub name."
            ) from error
        pooling, _ = split_settings({**settings, "model_type": kind})
        encoder = read_library_model(
            KINDS[kind][1], pretrained, kind="text encoder", add_pooling_layer=False
        )
        own = json_fields(encoder.config) | {"model_type": kind, "pooling": pooling}
        check_same_settings(settings, own, pretrained)
        return cls(own, modalities=modalities, encoder=encoder)
