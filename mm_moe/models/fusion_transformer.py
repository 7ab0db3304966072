"""Fusion of the modalities' tokens by a transformer with dense or sparse blocks, and the head.

Axes: B samples, M modalities, P tokens of each, H their width, T = M * P, C outputs, R = B * M rows
of one sample and one modality.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_moe.backbones.attention import attend
from mm_moe.backbones.base import check_options
from mm_moe.batch import pattern_index
from mm_moe.errors import ConfigError
from mm_moe.moe.context import TokenContext
from mm_moe.moe.experts import Experts
from mm_moe.moe.layer import MoELayer, RoutingRecord
from mm_moe.moe.router import Router
from mm_moe.moe.settings import MoESettings
from mm_moe.registry import nearest

SPARSE = ("none", "alternate", "all")
RECORD = "fusion"  # first part of the names of the sparse blocks' records


@dataclass(frozen=True)
class TransformerSettings:
    """Shape of the fusion transformer.

    Attributes:
        depth: blocks.
        num_heads: attention heads.
        hidden: width inside a feed-forward; 0: 2 H.
        dropout: of attention weights, of both parts of a block, and inside a dense feed-forward.
        sparse: "none", "alternate" (blocks 0, 2, 4, ...) or "all": which feed-forwards are experts.
        num_experts: of a sparse block, over all processes.
        top_k: experts that a token visits.
        router: a registered name.
        moe: further fields of `MoESettings`.
        legacy_residual: a + Drop(a) in the place of X + Drop(a), a the output of the attention:
            what the released code of Flex-MoE and MoE-Retriever computes, for comparison.

    Raises:
        ConfigError: a value that cannot work.
    """

    depth: int = 1
    num_heads: int = 4
    hidden: int = 0
    dropout: float = 0.1
    sparse: str = "none"
    num_experts: int = 16
    top_k: int = 4
    router: str = "noisy_topk"
    moe: dict[str, Any] = dataclasses.field(default_factory=dict)
    legacy_residual: bool = False

    def __post_init__(self) -> None:
        for name, least in (("depth", 1), ("num_heads", 1), ("hidden", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ConfigError(
                    f"fusion_config.{name} ({value!r}) must be a whole number, at least {least}."
                )
        known = isinstance(self.dropout, int | float) and not isinstance(self.dropout, bool)
        if not known or not 0 <= self.dropout < 1:
            raise ConfigError(f"fusion_config.dropout ({self.dropout!r}) must lie in [0, 1).")
        if self.sparse not in SPARSE:
            words = nearest(str(self.sparse), [*SPARSE])
            raise ConfigError(f"unknown fusion_config.sparse {self.sparse!r}; {words}")
        if not isinstance(self.legacy_residual, bool) or not isinstance(self.moe, dict):
            raise ConfigError(
                f"fusion_config.legacy_residual ({self.legacy_residual!r}) must be true or false, "
                f"and moe ({self.moe!r}) an object of settings."
            )
        if self.sparse != "none":
            self.moe_settings(())

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> TransformerSettings:
        """Settings from the fields that differ from the defaults.

        Raises:
            ConfigError: an unknown field, or a value that cannot work.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        check_options("fusion_config", options, known)
        return cls(**options)

    def moe_settings(self, modalities: Sequence[str]) -> MoESettings:
        """Of a sparse block."""
        own = {"num_experts": self.num_experts, "top_k": self.top_k, "router": self.router}
        known = {"modalities": list(modalities), "num_modalities": len(modalities)}
        return MoESettings.from_dict({**own, **self.moe, **known})

    def is_sparse(self, block: int) -> bool:
        """Whether the feed-forward of a block is a sparse layer."""
        return self.sparse == "all" or (self.sparse == "alternate" and block % 2 == 0)


class FusionBlock(nn.Module):
    """Pre-norm attention among all tokens, then a feed-forward, dense or sparse."""

    def __init__(
        self, width: int, settings: TransformerSettings, *, moe: MoESettings | None
    ) -> None:
        super().__init__()
        self.num_heads, self.dropout = settings.num_heads, settings.dropout
        self.legacy_residual = settings.legacy_residual
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        hidden = settings.hidden or 2 * width
        self.mlp: nn.Module
        if moe is not None:
            self.mlp = MoELayer(width=width, hidden=hidden, settings=moe)
        else:
            layers = OrderedDict(
                fc1=nn.Linear(width, hidden),
                act=nn.GELU(),
                drop=nn.Dropout(settings.dropout),
                fc2=nn.Linear(hidden, width),
            )
            self.mlp = nn.Sequential(layers)

    def forward(
        self, x_BTH: Tensor, mask_BT: Tensor, rows: tuple[int, int], context: TokenContext
    ) -> tuple[Tensor, RoutingRecord | None]:
        """Tokens that leave the block, and the record of a sparse feed-forward.

        Args:
            x_BTH: tokens, those of one modality together.
            mask_BT: which of them are real.
            rows: (R, P), how a sparse layer sees the tokens: one row for each sample and modality.
            context: of these rows.
        """
        attended_BTH = attend(
            *self.qkv(self.norm1(x_BTH)).chunk(3, dim=-1),
            num_heads=self.num_heads,
            mask_NL=mask_BT,
            dropout=self.dropout if self.training else 0.0,
        )
        attended_BTH = self.out(attended_BTH)
        kept_BTH = attended_BTH if self.legacy_residual else x_BTH
        x_BTH = kept_BTH + self._drop(attended_BTH)
        u_BTH, record = self.norm2(x_BTH), None
        if isinstance(self.mlp, MoELayer):
            y_RPH, record = self.mlp(
                u_BTH.reshape(*rows, u_BTH.shape[-1]), mask_BT.reshape(rows), context
            )
            y_BTH = y_RPH.view_as(x_BTH)
        else:
            y_BTH = self.mlp(u_BTH)
        return x_BTH + self._drop(y_BTH), record

    def _drop(self, y_BTH: Tensor) -> Tensor:
        return F.dropout(y_BTH, self.dropout, self.training)


class TransformerHead(nn.Module):
    """Positions, blocks over the tokens of all modalities, the mean of each modality, a classifier.

    A missing modality that nothing fills has no part in it: no token attends to its tokens, no
    expert gets them, and its mean is zero. With a fill all tokens are real.

    Source: the fusion model of Flex-MoE (Yun et al. 2024) and MoE-Retriever. Their released code
    attends to the zeros of missing modalities, and its residual leaves the input out.

    Args:
        widths: of each modality's feature; each is P * H.
        num_outputs: C.
        num_tokens: P.
        modalities: their names, in order.
        settings: of the transformer.
        head_hidden: width of a hidden layer in the classifier; 0: none.

    Raises:
        ConfigError: widths that differ, or that do not fit the heads.
    """

    def __init__(
        self,
        widths: Sequence[int],
        num_outputs: int,
        *,
        num_tokens: int,
        modalities: Sequence[str],
        settings: TransformerSettings,
        head_hidden: int = 0,
    ) -> None:
        super().__init__()
        width = widths[0] // num_tokens
        if len(set(widths)) > 1 or width * num_tokens != widths[0]:
            raise ConfigError(
                f"fusion 'transformer' needs features of one width, a multiple of {num_tokens} "
                f"tokens; the backbone's are {', '.join(map(str, widths))}. Take --backbone "
                "clinical, or --fusion concat."
            )
        if width % settings.num_heads:
            raise ConfigError(
                f"the width of a token ({width}) must be a multiple of fusion_config.num_heads "
                f"({settings.num_heads})."
            )
        self.num_tokens, self.width = num_tokens, width
        self.position_1TH = nn.Parameter(torch.zeros(1, len(widths) * num_tokens, width))
        moe = settings.moe_settings(modalities)
        self.blocks = nn.ModuleList(
            FusionBlock(width, settings, moe=moe if settings.is_sparse(block) else None)
            for block in range(settings.depth)
        )
        pooled = len(widths) * width
        layers: list[nn.Module] = [nn.Linear(head_hidden or pooled, num_outputs)]
        if head_hidden:
            layers = [nn.Linear(pooled, head_hidden), nn.ReLU(), nn.Dropout(0.5), *layers]
        self.mlp = nn.Sequential(*layers)

    def draw(self) -> None:
        """New weights: those of each part by itself, and positions of zero."""
        nn.init.zeros_(self.position_1TH)
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.LayerNorm | Router):
                part.reset_parameters()
            elif isinstance(part, Experts):
                nn.init.normal_(part.w_in, std=part.w_in.shape[1] ** -0.5)
                nn.init.normal_(part.w_out, std=part.w_out.shape[1] ** -0.5)
                nn.init.zeros_(part.b_in)
                nn.init.zeros_(part.b_out)

    def sparse_layers(self) -> dict[str, MoELayer]:
        """The sparse layers by the names of their routing records, "fusion.<block>"."""
        return {
            f"{RECORD}.{index}": block.mlp
            for index, block in enumerate(self.blocks)
            if isinstance(block.mlp, MoELayer)
        }

    def fuse(
        self, parts: Sequence[Tensor], present_BM: Tensor, *, filled: bool = False
    ) -> tuple[Tensor, dict[str, RoutingRecord]]:
        """Logits (B, C) and the records of the sparse blocks.

        Args:
            parts: one feature (B, P * H) per modality, in order.
            present_BM: what each sample has; a router may be told of it.
            filled: whether the features of what is missing were filled, and count.
        """
        num_samples, num_modalities = present_BM.shape
        x_BTH = torch.stack([*parts], dim=1).view(num_samples, *self.position_1TH.shape[1:])
        x_BTH = x_BTH + self.position_1TH
        real_BM = torch.ones_like(present_BM) if filled else present_BM
        mask_BT = real_BM.repeat_interleave(self.num_tokens, dim=1)
        rows = (num_samples * num_modalities, self.num_tokens)
        place_M = torch.arange(num_modalities, device=present_BM.device)
        context = TokenContext(
            combination=pattern_index(present_BM).repeat_interleave(num_modalities),
            target=place_M.repeat(num_samples),
        )
        records: dict[str, RoutingRecord] = {}
        for index, block in enumerate(self.blocks):
            x_BTH, record = block(x_BTH, mask_BT, rows, context)
            if record is not None:
                records[f"{RECORD}.{index}"] = record
        mean_BMH = x_BTH.unflatten(1, (num_modalities, self.num_tokens)).mean(2)
        pooled_BMH = torch.where(real_BM[..., None], mean_BMH, 0.0)
        return self.mlp(pooled_BMH.flatten(1)), records
