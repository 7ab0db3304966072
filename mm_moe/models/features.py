"""Features of every row without training: a frozen backbone's, or the mean of a sequence.

Axes: N rows of a split, D width of a feature, T steps of a sequence.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mm_moe.backbones.base import SequenceNeeds
from mm_moe.batch import Batch, Sample
from mm_moe.models.modeling import MultimodalMoEModel
from mm_moe.models.sequence_processing import SequenceProcessor


@dataclass(frozen=True)
class FrozenFeatures:
    """Features of a split in the order of its rows.

    Attributes:
        ids: N sample ids.
        feature_ND: modality -> float32 (N, D), NaN in rows that lack it.
    """

    ids: tuple[str, ...]
    feature_ND: dict[str, np.ndarray]


@torch.no_grad()
def frozen_features(model: MultimodalMoEModel, batches: Iterable[Batch]) -> FrozenFeatures:
    """Run each tower on the rows that have its modality; no prompt, no head, no gradient."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    ids: list[str] = []
    parts: dict[str, list[np.ndarray]] = {name: [] for name in model.modalities}
    for batch in batches:
        ids += batch.ids
        for m, name in enumerate(model.modalities):
            present_B = batch.present[:, m].numpy()
            found_BD = np.full(
                (len(batch.ids), model.backbone.feature_width(name)), np.nan, dtype=np.float32
            )
            if name in batch.inputs:
                payload = {key: value.to(device) for key, value in batch.inputs[name].items()}
                feature_ND, _ = model.backbone.encode(name, payload)
                found_BD[present_B] = feature_ND.float().cpu().numpy()
            parts[name].append(found_BD)
    model.train(was_training)
    return FrozenFeatures(tuple(ids), {name: np.concatenate(rows) for name, rows in parts.items()})


def mean_features(
    samples: Iterable[Sample], *, sequences: Mapping[str, Mapping[str, Any]]
) -> FrozenFeatures:
    """The mean over the steps of each sequence: what can be told without any tower.

    Args:
        samples: with their payloads.
        sequences: modality -> {"width", "length", ...}, of the data set.
    """
    ids: list[str] = []
    parts: dict[str, list[np.ndarray]] = {name: [] for name in sequences}
    needs = {
        name: SequenceNeeds(about["width"], about["length"]) for name, about in sequences.items()
    }
    processors = {name: SequenceProcessor(need) for name, need in needs.items()}
    for sample in samples:
        ids.append(sample.id)
        for name, rows in parts.items():
            mean_D = np.full(needs[name].width, np.nan, dtype=np.float32)
            if sample.payload.get(name) is not None:
                mean_D = processors[name]([sample.payload[name]])["values"][0].mean(0).numpy()
            rows.append(mean_D)
    return FrozenFeatures(tuple(ids), {name: np.stack(rows) for name, rows in parts.items()})
