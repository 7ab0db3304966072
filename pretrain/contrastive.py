"""Contrastive objectives over the global batch: CLIP's softmax and SigLIP's sigmoid loss.

B samples of this rank, G samples of all ranks, D joint width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mm_moe.batch import IMAGE, TEXT
from mm_moe.errors import ConfigError
from mm_moe.models.configuration import LOGIT_SCALE
from mm_moe.registry import nearest
from mm_moe.training.collectives import gather_rows, mean_weight
from mm_moe.training.grad_cache import FeatureObjective
from pretrain.pair_blocks import EXCLUDED, Tiling, tiled_loss, unpacked

MAX_LOGIT_SCALE = 100.0  # CLIP's clamp; without it the scale can run away
LOSSES = ("softmax", "sigmoid")
VARIANTS = ("gather", "chunked", "ring")


def contrastive_loss(
    image_BD: Tensor,
    text_BD: Tensor,
    complete_B: Tensor,
    logit_scale: Tensor,
    *,
    logit_bias: Tensor | None = None,
    loss: str = "softmax",
    variant: str = "gather",
    chunk: int = 1024,
) -> Tensor:
    """Loss of matching image and text among all ranks' complete pairs, a scalar.

    "softmax" is CLIP's (Radford et al. 2021): symmetric cross-entropy, mean over the pairs.
    "sigmoid" is SigLIP's (Zhai et al. 2023): every image with every text is one yes-or-no question,
    the sum over them divided by the number of pairs. The scale is clamped for both, as open_clip
    does; SigLIP's paper has no clamp.

    Args:
        image_BD: image features, not normalised. Float64 is kept, all else becomes float32.
        text_BD: text features.
        complete_B: bool; only rows with both modalities are pairs, the others are neither positives
            nor negatives (CLIP knows no missing modality; leaving them out is ours).
        logit_scale: natural logarithm of the inverse temperature.
        logit_bias: added to all logits; the softmax does not see it.
        loss: one of `LOSSES`.
        variant: "gather" has the features of all ranks and all of this rank's logits (B x G);
            "chunked" has the features and a tile of logits; "ring" has one other rank's features
            and a tile. All give the same numbers.
        chunk: rows and columns of a tile.

    Returns:
        This rank's share, whose mean over ranks is the loss of the global batch. 0 without any
        pair.
    """
    image_BD, text_BD = (F.normalize(_wide(part), dim=-1, eps=1e-6) for part in (image_BD, text_BD))
    counts_B = complete_B.to(image_BD.dtype)
    scale = _wide(logit_scale).to(image_BD.dtype).exp().clamp(max=MAX_LOGIT_SCALE).reshape(1)
    bias = scale.new_zeros(1) if logit_bias is None else logit_bias.to(scale.dtype).reshape(1)
    sigmoid = loss == "sigmoid"
    keys = torch.cat([image_BD, text_BD, counts_B.unsqueeze(1)], dim=1)
    tiling = Tiling(sigmoid, chunk, ring=variant == "ring")
    if variant != "ring":
        keys, first = gather_rows(keys)
        tiling = Tiling(sigmoid, chunk, first=first)
    compute = _whole_loss if variant == "gather" else tiled_loss
    total = compute(image_BD, text_BD, counts_B, keys, scale=scale, bias=bias, tiling=tiling)
    share = total * mean_weight(complete_B.sum(), dtype=total.dtype)
    return share if sigmoid else share / 2


def _wide(values: Tensor) -> Tensor:
    """At least float32: logits of bf16 features would be too coarse."""
    return values if values.dtype == torch.float64 else values.float()


def _whole_loss(
    image_BD: Tensor,
    text_BD: Tensor,
    counts_B: Tensor,
    keys: Tensor,
    *,
    scale: Tensor,
    bias: Tensor,
    tiling: Tiling,
) -> Tensor:
    """`tiled_loss` with all logits of this rank at once: fastest where they fit."""
    image_GD, text_GD, counts_G = unpacked(keys)
    if tiling.sigmoid:
        # what each logit should be large in: "no" but for the pairs
        signed_BG = ((-scale * image_BD) @ text_GD.T).sub_(bias)
        signed_BG.diagonal(tiling.first).neg_()
        return -((F.logsigmoid(signed_BG) @ counts_G) * counts_B).sum()
    own_B = torch.arange(len(image_BD), device=image_BD.device) + tiling.first
    lacking = counts_G == 0, counts_B == 0
    if len(image_BD) < len(image_GD):
        logits_BG = _masked((scale * image_BD) @ text_GD.T, *lacking)
        image_losses_B = F.cross_entropy(logits_BG, own_B, reduction="none")
        del logits_BG  # backward needs the log-probabilities alone
        logits_BG = _masked((scale * text_BD) @ image_GD.T, *lacking)
    else:  # all rows are here, so the other direction is the transpose
        logits_BG = _masked((scale * image_BD) @ text_GD.T, *lacking)
        image_losses_B = F.cross_entropy(logits_BG, own_B, reduction="none")
        logits_BG = logits_BG.T
    text_losses_B = F.cross_entropy(logits_BG, own_B, reduction="none")
    total = ((image_losses_B + text_losses_B) * counts_B).sum()
    return total + 0 * bias.sum()  # the bias has a gradient, of zero


def _masked(logits_BG: Tensor, lacking_G: Tensor, lacking_B: Tensor) -> Tensor:
    """Exclude the rows that are no pairs on both sides, in place: a copy would be a second B x G.

    The losses of the excluded rows count for nothing; excluding them makes the transpose masked.
    """
    return logits_BG.masked_fill_(lacking_G, EXCLUDED).masked_fill_(lacking_B[:, None], EXCLUDED)


@dataclass(frozen=True)
class Contrastive(FeatureObjective):
    """Pairs of image and text; a pair that lacks one of the two feeds nothing here.

    Labels, if the data set has any, are not used.

    Attributes:
        problem_type: of the data set; not used.
        loss: "softmax" or "sigmoid".
        variant: "gather", "chunked" or "ring"; see `contrastive_loss`.
        chunk: rows and columns of a tile of logits, of "chunked" and "ring".

    Raises:
        ConfigError: an unknown loss or variant, or a chunk below 1.
    """

    uses_labels: ClassVar[bool] = False  # the model gets no head

    problem_type: str = "none"
    loss: str = "softmax"
    variant: str = "gather"
    chunk: int = 1024
    part: ClassVar[str] = "contrastive"

    def __post_init__(self) -> None:
        for field, value, known in (
            ("loss", self.loss, LOSSES),
            ("variant", self.variant, VARIANTS),
        ):
            if value not in known:
                hint = nearest(str(value), list(known))
                raise ConfigError(f"unknown objective_config.{field} {value!r}; {hint}")
        if isinstance(self.chunk, bool) or not isinstance(self.chunk, int) or self.chunk < 1:
            raise ConfigError(
                f"objective_config.chunk ({self.chunk!r}) must be a whole number from 1; 1024 is "
                "the default."
            )

    @property
    def logit_start(self) -> tuple[float, float | None]:
        """Logarithm of the scale and bias to start from; SigLIP's are log 10 and -10."""
        return (math.log(10.0), -10.0) if self.loss == "sigmoid" else (LOGIT_SCALE, None)

    def from_features(
        self, features: Mapping[str, Tensor], present: Tensor, own: Mapping[str, Tensor]
    ) -> Tensor:
        """The loss of features (B, D) by modality; scale and bias are the model's own."""
        return contrastive_loss(
            features[IMAGE],
            features[TEXT],
            present.all(dim=1),
            own["logit_scale"],
            logit_bias=own["logit_bias"] if self.loss == "sigmoid" else None,
            loss=self.loss,
            variant=self.variant,
            chunk=self.chunk,
        )


@dataclass(frozen=True)
class Siglip(Contrastive):
    """`Contrastive` with the sigmoid loss."""

    loss: str = "sigmoid"
