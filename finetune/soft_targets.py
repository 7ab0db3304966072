"""Objectives for soft targets: a share in [0, 1] for every class, as VQA's annotators give them.

Both take the logits as they are. A product of experts hands in the sum of its experts' logits:
with normalised log-probabilities, which are never above 0, a sigmoid could not pass one half.

B samples, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mm_moe.batch import IGNORED_LABEL, Batch
from mm_moe.errors import ConfigError
from mm_moe.training.collectives import mean_weight


def soft_bce(logits_BC: Tensor, targets_BC: Tensor) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy summed over the classes (that is, its mean times C).

    Returns:
        The sum over the rows that have a label, and their number. A row without any share is a
        target of zeros and counts.
    """
    keep_B = (targets_BC != IGNORED_LABEL).all(-1)
    each_BC = F.binary_cross_entropy_with_logits(
        logits_BC, targets_BC.clamp(min=0), reduction="none"
    )
    return (each_BC.sum(-1) * keep_B).sum(), keep_B.sum()


def soft_cross_entropy(logits_BC: Tensor, targets_BC: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy to the shares brought to the sum 1.

    Returns:
        The sum over the rows, and their number. Rows without a label, or without any share (all
        answers are outside the vocabulary), take no part.
    """
    shares_BC = targets_BC.clamp(min=0)
    total_B = shares_BC.sum(-1)
    keep_B = total_B > 0
    weight_BC = shares_BC / total_B.clamp(min=torch.finfo(shares_BC.dtype).tiny).unsqueeze(-1)
    each_B = -(weight_BC * F.log_softmax(logits_BC, dim=-1)).sum(-1)
    return (each_B * keep_B).sum(), keep_B.sum()


@dataclass(frozen=True)
class SoftBce:
    """`soft_bce` over the rows of all ranks, plus what routers and prompts ask for.

    Raises:
        ConfigError: data whose labels are no list or map of shares.
    """

    problem_type: str

    def __post_init__(self) -> None:
        if self.problem_type != "multi_label_classification":
            raise ConfigError(
                f"soft targets need data of problem type multi_label_classification, these are "
                f"{self.problem_type}; take --objective supervised."
            )

    @staticmethod
    def total(logits_BC: Tensor, targets_BC: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over this rank's rows that count, and their number."""
        return soft_bce(logits_BC, targets_BC)

    def __call__(self, model, batch: Batch) -> tuple[Tensor, dict[str, Tensor], object]:
        """Return (loss, parts of it for the log, the model's output)."""
        output = model(**batch)
        labels = batch.labels
        if labels is None:
            raise ConfigError("the data set has no labels; take the objective contrastive instead.")
        total, count = self.total(output.logits.float(), labels.float())
        parts = {"task": total * mean_weight(count), **output.losses}
        return torch.stack([part.float() for part in parts.values()]).sum(), parts, output


@dataclass(frozen=True)
class SoftCrossEntropy(SoftBce):
    """`soft_cross_entropy` over the rows of all ranks, plus what routers and prompts ask for."""

    @staticmethod
    def total(logits_BC: Tensor, targets_BC: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over this rank's rows that count, and their number."""
        return soft_cross_entropy(logits_BC, targets_BC)
