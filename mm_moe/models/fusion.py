"""From the towers' features to logits: concatenation, a low-rank tensor or a transformer; the head.

Axes: B samples, D width of one feature, F width of the fused feature, R rank, C outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mm_moe.errors import ConfigError
from mm_moe.models.fusion_transformer import TransformerHead, TransformerSettings
from mm_moe.registry import nearest

HEAD_STD = 0.02
TRANSFORMER = "transformer"
FUSIONS = ("concat", "low_rank", TRANSFORMER)


@dataclass(frozen=True)
class FusionSettings:
    """How features become logits.

    Attributes:
        fusion: "concat", "low_rank" or "transformer".
        rank: of the low-rank tensor.
        size: F of the low-rank tensor.
        hidden: width of the head's hidden layer; 0: the head is one linear layer.
        options: fields of `TransformerSettings`.
    """

    fusion: str = "concat"
    rank: int = 40
    size: int = 120
    hidden: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.fusion not in FUSIONS:
            raise ConfigError(f"unknown fusion {self.fusion!r}; {nearest(self.fusion, [*FUSIONS])}")
        for name, value in (("fusion_rank", self.rank), ("fusion_size", self.size)):
            if value < 1:
                raise ConfigError(f"{name} ({value}) must be at least 1.")
        if self.hidden < 0:
            raise ConfigError(f"head_hidden_size ({self.hidden}) must be at least 0; 0 is none.")
        if self.options and self.fusion != TRANSFORMER:
            raise ConfigError(
                f"fusion_config ({', '.join(self.options)}) is for --fusion transformer, not "
                f"{self.fusion!r}; leave it out."
            )
        self.transformer  # noqa: B018 (checks the options)

    @property
    def transformer(self) -> TransformerSettings:
        """The options of the transformer."""
        return TransformerSettings.from_dict(self.options)


class LinearHead(nn.Linear):
    """One linear layer on the concatenated features, from small weights."""

    def __init__(self, width: int, num_outputs: int) -> None:
        super().__init__(width, num_outputs)
        self.draw()

    @torch.no_grad()
    def draw(self) -> None:
        """New weights."""
        if not self.weight.is_meta:
            nn.init.normal_(self.weight, std=HEAD_STD)
            nn.init.zeros_(self.bias)

    def fuse(self, parts: Sequence[Tensor]) -> Tensor:
        """Logits (B, C) from one feature (B, D) per modality."""
        return self(torch.cat([*parts], dim=-1))


class LowRankFusion(nn.Module):
    """f = sum_r w_r (prod_m [x_m; 1] W_m[r]) + b, a product of all modalities in R factors.

    A feature of zeros (an absent modality) leaves the appended 1 alone: the product then runs over
    the modalities that are there, with learned constants for the others.

    Source: Liu et al. 2018, Efficient Low-rank Multimodal Fusion. Released code of I2M2 and
    MultiBench keeps the factors in a plain list, where no optimizer finds them; here they are
    registered, and trained.

    Args:
        widths: D of each modality.
        rank: R.
        size: F.
    """

    def __init__(self, widths: Sequence[int], *, rank: int, size: int) -> None:
        super().__init__()
        self.factors = nn.ParameterList(
            nn.Parameter(torch.empty(rank, width + 1, size)) for width in widths
        )
        self.weight_1R = nn.Parameter(torch.empty(1, rank))
        self.bias_F = nn.Parameter(torch.empty(size))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Xavier-normal factors, each of the R matrices by itself, and bias 0."""
        for factor_RDF in self.factors:
            for matrix_DF in factor_RDF:
                nn.init.xavier_normal_(matrix_DF)
        nn.init.xavier_normal_(self.weight_1R)
        nn.init.zeros_(self.bias_F)

    def forward(self, parts: Sequence[Tensor]) -> Tensor:
        """Fused features (B, F) from one feature (B, D) per modality."""
        product_RBF: Tensor | None = None
        for x_BD, factor_RDF in zip(parts, self.factors, strict=True):
            # [x; 1] W = x W[:-1] + W[-1]
            y_RBF = x_BD @ factor_RDF[:, :-1] + factor_RDF[:, -1:]
            product_RBF = y_RBF if product_RBF is None else product_RBF * y_RBF
        assert product_RBF is not None, "a model has a modality"
        return torch.einsum("r,rbf->bf", self.weight_1R[0], product_RBF) + self.bias_F


class FusedHead(nn.Module):
    """Fusion, then linear - ReLU - linear (or one linear layer)."""

    def __init__(self, widths: Sequence[int], num_outputs: int, settings: FusionSettings) -> None:
        super().__init__()
        self.low_rank: LowRankFusion | None = None
        width = sum(widths)
        if settings.fusion == "low_rank":
            width = settings.size
            self.low_rank = LowRankFusion(widths, rank=settings.rank, size=settings.size)
        hidden = settings.hidden
        layers: list[nn.Module] = [nn.Linear(hidden or width, num_outputs)]
        if hidden:
            layers = [nn.Linear(width, hidden), nn.ReLU(), *layers]
        self.mlp = nn.Sequential(*layers)

    def draw(self) -> None:
        """New weights: those of each part by itself."""
        for part in self.modules():
            if isinstance(part, nn.Linear | LowRankFusion):
                part.reset_parameters()

    def fuse(self, parts: Sequence[Tensor]) -> Tensor:
        """Logits (B, C) from one feature (B, D) per modality."""
        fused_BF = self.low_rank(parts) if self.low_rank is not None else torch.cat([*parts], -1)
        return self.mlp(fused_BF)


Head = LinearHead | FusedHead | TransformerHead


def new_head(
    widths: Sequence[int],
    num_outputs: int,
    settings: FusionSettings,
    *,
    num_tokens: int = 1,
    modalities: Sequence[str] = (),
) -> Head:
    """The head of a model whose modalities have features of these widths.

    Args:
        widths: of each modality's feature.
        num_outputs: C.
        settings: how they become logits.
        num_tokens: that a feature consists of; the transformer needs it, and the names.
        modalities: in order.
    """
    if settings.fusion == TRANSFORMER:
        return TransformerHead(
            widths,
            num_outputs,
            num_tokens=num_tokens,
            modalities=modalities,
            settings=settings.transformer,
            head_hidden=settings.hidden,
        )
    if settings.fusion == "concat" and not settings.hidden:
        return LinearHead(sum(widths), num_outputs)
    return FusedHead(widths, num_outputs, settings)
