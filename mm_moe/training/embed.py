"""Features of a split by modality, each sample exactly once, on any number of ranks.

N samples, D joint width, M modalities.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from mm_moe.batch import Batch
from mm_moe.training.predict import batches_in_step
from mm_moe.training.runtime import gather_objects


@dataclass(frozen=True)
class Embedded:
    """Unit-length features of one modality in the order of their ids.

    Attributes:
        ids: N sample ids, sorted; only samples that have the modality.
        features: float32 (N, D).
    """

    ids: list[str]
    features: np.ndarray

    def of(self, ids: Iterable[str]) -> np.ndarray:
        """The features of some samples, in their order."""
        place = {sample: row for row, sample in enumerate(self.ids)}
        return self.features[[place[sample] for sample in ids]]


@torch.no_grad()
def embed(
    model: nn.Module, batches: Iterable[Batch], *, modalities: tuple[str, ...]
) -> dict[str, Embedded]:
    """Encode this rank's batches and gather all ranks' features, on every rank. A collective.

    Args:
        model: gives "features" by modality, as `mm_moe.models.modeling` does.
        batches: of this rank; the others may hold more or fewer.
        modalities: of the model, in the order of `present`.
    """
    was_training = model.training
    model.eval()
    rows: dict[str, list[tuple[str, np.ndarray]]] = {name: [] for name in modalities}
    for batch in batches_in_step(model, batches, num_modalities=len(modalities)):
        output = model(**batch)
        for m, name in enumerate(modalities):
            has_B = batch.present[:, m].cpu().numpy()
            if has_B.any():
                unit_BD = F.normalize(output.features[name].float(), dim=-1).cpu().numpy()
                found = zip(batch.ids, unit_BD, has_B, strict=True)
                rows[name] += [(sample, unit_D) for sample, unit_D, has in found if has]
    model.train(was_training)
    everyone = gather_objects(rows)
    return {name: _sorted([row for rank in everyone for row in rank[name]]) for name in modalities}


def _sorted(rows: list[tuple[str, np.ndarray]]) -> Embedded:
    rows = sorted(rows, key=lambda row: row[0])
    width = len(rows[0][1]) if rows else 0
    features = np.array([unit_D for _, unit_D in rows], dtype=np.float32).reshape(len(rows), width)
    return Embedded([sample for sample, _ in rows], features)
