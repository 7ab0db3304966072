"""Supervised objectives: a label for each sample.

B samples, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from finetune.survival import cox_loss
from mm_moe.batch import IGNORED_LABEL, Batch
from mm_moe.errors import ConfigError
from mm_moe.training.collectives import mean_weight


def task_loss(logits_BC: Tensor, labels: Tensor | None, problem_type: str) -> Tensor:
    """Mean loss over all ranks' rows that have a label, a float32 scalar.

    Cross-entropy, binary cross-entropy over classes, absolute error, or Cox's partial likelihood
    with Efron's ties (see `finetune.survival`), by `problem_type`. A batch in which no row has a
    label gives exactly 0, connected to the logits: every rank must run the same backward pass.

    Returns:
        This rank's share, whose mean over ranks is the loss of the global batch.

    Raises:
        ConfigError: unknown problem type, or data without labels.
    """
    if labels is None:
        raise ConfigError("the data set has no labels; take the objective contrastive instead.")
    logits_BC = logits_BC.float()
    if problem_type == "single_label_classification":
        keep_B = labels != IGNORED_LABEL
        total = F.cross_entropy(logits_BC, labels, ignore_index=IGNORED_LABEL, reduction="sum")
        return total * mean_weight(keep_B.sum())
    if problem_type == "multi_label_classification":
        keep_BC = labels != IGNORED_LABEL
        each_BC = F.binary_cross_entropy_with_logits(
            logits_BC, labels.float().clamp(min=0), reduction="none"
        )
        return (each_BC * keep_BC).sum() * mean_weight(keep_BC.sum())
    if problem_type == "regression":
        keep_B = torch.isfinite(labels) & (labels != IGNORED_LABEL)
        error_B = (logits_BC.squeeze(-1) - labels.float().where(keep_B, 0.0)).abs()
        return (error_B * keep_B).sum() * mean_weight(keep_B.sum())
    if problem_type == "survival":
        return cox_loss(logits_BC.squeeze(-1), labels)
    raise ConfigError(
        f"problem type {problem_type!r} has no supervised loss; take one of "
        "single_label_classification, multi_label_classification, regression, survival."
    )


@dataclass(frozen=True)
class Supervised:
    """The loss of a labelled batch: the task's loss plus what routers and prompts ask for."""

    problem_type: str

    def __call__(self, model, batch: Batch) -> tuple[Tensor, dict[str, Tensor], object]:
        """Return (loss, parts of it for the log, the model's output)."""
        output = model(**batch)
        parts = {"task": task_loss(output.logits, batch.labels, self.problem_type), **output.losses}
        return torch.stack([part.float() for part in parts.values()]).sum(), parts, output
