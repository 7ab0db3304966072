"""CLIP's softmax contrastive loss over the global batch (Radford et al., 2021).

B samples of this rank, G samples of all ranks, D joint width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mm_moe.batch import IMAGE, TEXT, Batch
from mm_moe.training.collectives import gather_rows, mean_weight

MAX_LOGIT_SCALE = 100.0  # CLIP's clamp; without it the scale can run away


def contrastive_loss(
    image_BD: Tensor, text_BD: Tensor, complete_B: Tensor, logit_scale: Tensor
) -> Tensor:
    """Symmetric cross-entropy of matching image and text among all ranks' complete pairs, a scalar.

    Args:
        image_BD: image features, not normalised.
        text_BD: text features.
        complete_B: bool; only rows with both modalities are pairs, the others are neither positives
            nor negatives (CLIP knows no missing modality; leaving them out is ours).
        logit_scale: natural logarithm of the inverse temperature.

    Returns:
        This rank's share, whose mean over ranks is the loss of the global batch. 0 without any
        pair.
    """
    image_BD = F.normalize(image_BD.float(), dim=-1, eps=1e-6)
    text_BD = F.normalize(text_BD.float(), dim=-1, eps=1e-6)
    image_GD, first = gather_rows(image_BD)
    text_GD, _ = gather_rows(text_BD)
    complete_G = gather_rows(complete_B.float().unsqueeze(1))[0].squeeze(1) > 0
    scale = logit_scale.float().exp().clamp(max=MAX_LOGIT_SCALE)
    target_B = torch.arange(len(image_BD), device=image_BD.device) + first
    total = image_BD.new_zeros(())
    for query_BD, key_GD in ((image_BD, text_GD), (text_BD, image_GD)):
        logits_BG = scale * query_BD @ key_GD.T
        logits_BG = logits_BG.masked_fill(~complete_G & ~_own(logits_BG, first), -1e4)
        each_B = F.cross_entropy(logits_BG, target_B, reduction="none")
        total = total + (each_B * complete_B).sum()
    return total / 2 * mean_weight(complete_B.sum())


def _own(logits_BG: Tensor, first: int) -> Tensor:
    """Mask (B, G) of each row's own column, kept finite for rows that do not count."""
    own = torch.zeros_like(logits_BG, dtype=torch.bool)
    index_B = torch.arange(len(logits_BG), device=logits_BG.device)
    own[index_B, index_B + first] = True
    return own


@dataclass(frozen=True)
class Contrastive:
    """Pairs of image and text; a pair that lacks one of the two feeds nothing here.

    Labels, if the data set has any, are not used.
    """

    uses_labels: ClassVar[bool] = False  # the model gets no head

    problem_type: str = "none"

    def __call__(self, model, batch: Batch) -> tuple[Tensor, dict[str, Tensor], object]:
        """Return (loss, parts of it for the log, the model's output)."""
        output = model(**batch)
        inner = getattr(model, "module", model)
        loss = contrastive_loss(
            output.features[IMAGE],
            output.features[TEXT],
            batch.present.all(dim=1),
            inner.logit_scale,
        )
        parts = {"contrastive": loss, **output.losses}
        return torch.stack([part.float() for part in parts.values()]).sum(), parts, output
