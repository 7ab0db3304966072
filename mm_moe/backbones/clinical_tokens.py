"""From clinical vectors to P tokens of width H, and the parts that the other encoders share.

Every encoder of the backbone `clinical` gives P tokens per row, however wide the raw data are.

Axes: N rows, D raw width, P tokens, H width of a token, L states that are pooled, W their width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_moe.backbones.attention import attend
from mm_moe.backbones.base import Payload, run_feed_forward
from mm_moe.backbones.sequences import SequenceBlock
from mm_moe.errors import ConfigError, DataError
from mm_moe.moe.context import TokenContext
from mm_moe.moe.layer import RoutingRecord

QUERY_STD = 0.02
MOST_COPIES = 2  # of an allele


@dataclass(frozen=True)
class RawInput:
    """What one modality's rows are.

    Attributes:
        name: of the modality, for messages.
        shape: of one row, (length, width) for a sequence; empty for texts and pictures.
        sequence: whether a row is a sequence, padded and with a mask.
        events: {"variables", "mean", "std", "hours"} where the steps are irregular events.
    """

    name: str
    shape: tuple[int, ...] = ()
    sequence: bool = False
    events: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenShape:
    """What every encoder gives.

    Attributes:
        num_tokens: P.
        width: H.
        num_heads: of attention over tokens.
        dropout: of an encoder that has one.
    """

    num_tokens: int
    width: int
    num_heads: int
    dropout: float


class TokenEncoder(nn.Module, ABC):
    """Rows of one modality to P tokens each.

    Attributes:
        options: names of the integer options -> least value.
    """

    options: ClassVar[Mapping[str, int]] = MappingProxyType({})

    @abstractmethod
    def forward(self, payload: Payload) -> Tensor:
        """(N, P, H)."""

    @abstractmethod
    def blank(self) -> Payload:
        """A payload of one row without content."""

    def new_parts(self) -> list[nn.Module]:
        """Parts that train in a locked tower too; none where nothing comes pretrained."""
        return []


class PatchEmbedding(nn.Module):
    """A vector in P patches of ceil(D / P) values, zeros on the right, through one linear layer.

    Source: the patch embedding of Flex-MoE (Yun et al. 2024) and MoE-Retriever: no norm, no
    position (the fusion transformer adds one), nothing behind it.
    """

    def __init__(self, width: int, *, num_tokens: int, token_width: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.patch = -(-width // num_tokens)
        self.project = nn.Linear(self.patch, token_width)

    def forward(self, x_ND: Tensor) -> Tensor:
        """(N, P, H)."""
        x_ND = F.pad(x_ND, (0, self.num_tokens * self.patch - x_ND.shape[1]))
        return self.project(x_ND.view(len(x_ND), self.num_tokens, self.patch))


class AttentionPool(nn.Module):
    """Any number of states to P tokens: P learned queries attend to the normalised states.

    The queries are added to what they read, so that the tokens stay apart.
    """

    def __init__(self, width: int, shape: TokenShape) -> None:
        super().__init__()
        self.num_heads = shape.num_heads
        self.norm = nn.LayerNorm(width)
        self.query_PH = nn.Parameter(torch.empty(shape.num_tokens, shape.width))
        self.query = nn.Linear(shape.width, shape.width)
        self.key_value = nn.Linear(width, 2 * shape.width)
        self.out = nn.Linear(shape.width, shape.width)
        nn.init.normal_(self.query_PH, std=QUERY_STD)

    def forward(self, x_NLW: Tensor, mask_NL: Tensor | None = None) -> Tensor:
        """(N, P, H) from states (N, L, W); no query sees a state whose mask is False."""
        query_NPH = self.query_PH.expand(len(x_NLW), -1, -1)
        key_NLH, value_NLH = self.key_value(self.norm(x_NLW)).chunk(2, dim=-1)
        read_NPH = attend(
            self.query(query_NPH), key_NLH, value_NLH, num_heads=self.num_heads, mask_NL=mask_NL
        )
        return query_NPH + self.out(read_NPH)


def run_block(
    block: SequenceBlock,
    x_NLH: Tensor,
    *,
    num_heads: int,
    mask_NL: Tensor | None = None,
    keys_values: tuple[Tensor, Tensor] | None = None,
    context: TokenContext | None = None,
) -> tuple[Tensor, RoutingRecord | None]:
    """One pre-norm transformer block; the record is None where its feed-forward is dense."""
    attended_NLH = attend(
        *block.qkv(block.norm1(x_NLH)).chunk(3, dim=-1),
        num_heads=num_heads,
        extra=keys_values,
        mask_NL=mask_NL,
    )
    x_NLH = x_NLH + block.out(attended_NLH)
    y_NLH, record = run_feed_forward(block.mlp, block.norm2(x_NLH), mask_NL, context)
    return x_NLH + y_NLH, record


class VectorEncoder(TokenEncoder):
    """A vector of D values in patches; a cell that is NaN takes a learned value of its column.

    The learned values start at 0, which is the training mean of a standardised column.
    """

    def __init__(self, raw: RawInput, shape: TokenShape) -> None:
        super().__init__()
        self.raw_width = vector_width(raw)
        self.missing_D = nn.Parameter(torch.zeros(self.raw_width))
        self.patches = PatchEmbedding(
            self.raw_width, num_tokens=shape.num_tokens, token_width=shape.width
        )

    def forward(self, payload: Payload) -> Tensor:
        """(N, P, H)."""
        x_ND = vectors(payload, self.raw_width)
        return self.patches(torch.where(x_ND.isnan(), self.missing_D, x_ND))

    def blank(self) -> Payload:
        """One row of zeros."""
        return {"values": self.missing_D.new_zeros(1, self.raw_width)}


class DosageEncoder(TokenEncoder):
    """Allele counts 0, 1, 2 (or imputed dosages between them) in patches.

    Each count has a learned value, dosages between them are interpolated, and everything outside
    [0, 2] (NaN, -1, 3 or 255 in various files) has the value of "not called". They start as -1,
    0, 1 and 0; counts are not standardised before.
    """

    def __init__(self, raw: RawInput, shape: TokenShape) -> None:
        super().__init__()
        self.raw_width = vector_width(raw)
        self.dosage = nn.Parameter(torch.tensor([-1.0, 0.0, 1.0]))
        self.not_called = nn.Parameter(torch.zeros(1))
        self.patches = PatchEmbedding(
            self.raw_width, num_tokens=shape.num_tokens, token_width=shape.width
        )

    def forward(self, payload: Payload) -> Tensor:
        """(N, P, H)."""
        x_ND = vectors(payload, self.raw_width)
        first, second, third = self.dosage
        called_ND = (x_ND >= 0) & (x_ND <= MOST_COPIES)  # False for NaN
        x_ND = torch.where(called_ND, x_ND, 0.0)  # a NaN would reach the gradient
        value_ND = first + (second - first) * x_ND.clamp(max=1)
        value_ND = value_ND + (third - second) * (x_ND - 1).clamp(min=0)
        return self.patches(torch.where(called_ND, value_ND, self.not_called))

    def blank(self) -> Payload:
        """One row of zeros."""
        return {"values": self.dosage.new_zeros(1, self.raw_width)}


def vectors(payload: Payload, width: int) -> Tensor:
    """Rows (N, width) of a payload of vectors, or of sequences of one step."""
    x_ND = payload["values"].flatten(1)
    if x_ND.shape[1] != width:
        raise DataError(
            f"a row has {x_ND.shape[1]} values, the encoder takes {width}; use this model's own "
            "data."
        )
    return x_ND


def vector_width(raw: RawInput) -> int:
    """D of a modality whose rows are vectors.

    Raises:
        ConfigError: they are not.
    """
    steps = raw.shape[0] if raw.sequence else 1
    values = raw.shape[1:] if raw.sequence else raw.shape
    if steps != 1 or len(values) != 1:
        raise ConfigError(
            f"clinical.towers.{raw.name}: a table takes one vector per row, the rows are "
            f"{raw.shape}; take another kind."
        )
    return values[0]
