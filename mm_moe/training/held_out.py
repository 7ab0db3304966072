"""Scores of held-out samples that an objective itself defines: means over all ranks.

B samples of a batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mm_moe.batch import Batch
from mm_moe.training.predict import batches_in_step
from mm_moe.training.preemption import StopSignals
from mm_moe.training.runtime import gather_objects


class HeldOut(ABC):
    """An objective that can say how good a model is at samples it was not trained on."""

    @abstractmethod
    def held_out(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        """Score -> a value (N,) for each sample of the batch that it says something of.

        A value must be a function of weights and sample: of no other sample, of no process and of
        no generator. The same scores on every process, also for a batch without a sample.
        """


@torch.no_grad()
def held_out_means(
    objective: HeldOut,
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    num_modalities: int,
    signals: StopSignals | None = None,
) -> dict[str, float]:
    """Mean of each score over the samples of all ranks, the same on every rank. A collective.

    Sums are taken in float64, so that the mean does not depend on who held which sample. Ranks may
    hold different numbers of batches, or none; a last batch that is not full counts. The model
    comes back in the mode it was in.

    Args:
        objective: defines the scores.
        model: whole, or spread over the ranks.
        batches: of this rank.
        num_modalities: of a batch.
        signals: of this process.

    Returns:
        Score -> mean; a score that no sample has a value of is left out.

    Raises:
        StoppedError: on every rank before the next batch, when any rank was asked to stop.
    """
    was_training = model.training
    model.eval()
    sums: dict[str, list[float]] = {}
    counts: dict[str, int] = {}
    steps = batches_in_step(model, batches, num_modalities=num_modalities, signals=signals)
    try:
        for batch in steps:
            for name, values_N in objective.held_out(model, batch).items():
                sums.setdefault(name, []).append(float(values_N.double().sum()))
                counts[name] = counts.get(name, 0) + len(values_N)
    finally:
        model.train(was_training)
    mine = {name: (math.fsum(parts), counts[name]) for name, parts in sums.items()}
    ranks = gather_objects(mine)
    found = {}
    for name in dict.fromkeys(name for rank in ranks for name in rank):
        parts = [rank[name] for rank in ranks if name in rank]
        if count := sum(number for _, number in parts):
            found[name] = math.fsum(total for total, _ in parts) / count
    return found
