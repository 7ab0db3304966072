"""Predictions over a split, each sample exactly once, on any number of ranks.

N samples of the split, C classes, M modalities.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from mm_moe.batch import IGNORED_LABEL, Batch
from mm_moe.data.views import read_key
from mm_moe.training.preemption import StopSignals, strongest
from mm_moe.training.runtime import gather_objects


@dataclass(frozen=True)
class Predictions:
    """Scores of a split in the order of its ids.

    Attributes:
        ids: N sample ids, sorted.
        logits: float32 (N, C).
        labels: (N,) or (N, C).
        present: bool (N, M), what the model saw.
    """

    ids: list[str]
    logits: np.ndarray
    labels: np.ndarray
    present: np.ndarray


def empty_batch(num_modalities: int) -> Batch:
    """A batch of no sample: what a rank without data runs while others still have some."""
    return Batch.of([], torch.zeros(0, num_modalities, dtype=torch.bool), {}, torch.zeros(0))


def to_device(value, device: torch.device):
    """Move the tensors of a nested dict to `device`; other values stay."""
    if isinstance(value, torch.Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return type(value)({key: to_device(entry, device) for key, entry in value.items()})
    return value


def batches_in_step(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    num_modalities: int,
    signals: StopSignals | None = None,
) -> Iterator[Batch]:
    """This rank's batches as `model` takes them, then empty ones until the last rank is done.

    Raises:
        StoppedError: on every rank before the next batch, when any rank was asked to stop.
    """
    signals = signals or StopSignals()
    parameter = next(model.parameters())
    iterator = iter(batches)
    while True:
        batch = next(iterator, None)
        ranks = gather_objects((batch is not None, signals.received))
        if not any(has_batch for has_batch, _ in ranks):
            return
        signals.agree(strongest([received for _, received in ranks]))
        if signals.agreed:
            raise signals.error("during an evaluation")
        batch = empty_batch(num_modalities) if batch is None else batch
        yield _floats_as(to_device(batch, parameter.device), parameter.dtype)


@torch.no_grad()
def predict(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    num_modalities: int,
    signals: StopSignals | None = None,
) -> Predictions:
    """Run `model` over this rank's batches and gather all ranks' results, on every rank.

    Ranks may hold different numbers of batches: all go on until the last one is done, those without
    data run empty batches, because expert exchange needs every rank in every forward pass.

    Raises:
        StoppedError: on every rank before the next batch, when any rank was asked to stop.
    """
    was_training = model.training
    model.eval()
    rows: list[tuple] = []
    steps = batches_in_step(model, batches, num_modalities=num_modalities, signals=signals)
    for batch in steps:
        output = model(**batch)
        logits = output.logits.float().cpu().numpy()
        rows += list(
            zip(
                batch.ids,
                logits,
                _labels(batch),
                batch.present.cpu().numpy(),
                strict=True,
            )
        )
    model.train(was_training)
    everyone = sorted(
        (row for part in gather_objects(rows) for row in part), key=lambda row: row[0]
    )
    columns = list(zip(*everyone, strict=True)) if everyone else [(), (), (), ()]
    return Predictions(
        list(columns[0]), np.array(columns[1]), np.array(columns[2]), np.array(columns[3])
    )


def averaged(found: Predictions) -> Predictions:
    """Rows of the same id as one, with the mean of their logits."""
    ids, first_N, inverse_N = np.unique(found.ids, return_index=True, return_inverse=True)
    if len(ids) == len(found.ids):
        return found
    total_NC = np.zeros((len(ids), *found.logits.shape[1:]))
    np.add.at(total_NC, inverse_N, found.logits)
    mean_NC = total_NC / np.bincount(inverse_N)[:, None]
    return Predictions(
        ids.tolist(),
        mean_NC.astype(found.logits.dtype),
        found.labels[first_N],
        found.present[first_N],
    )


def by_protocol(found: Predictions, *, count: int) -> Iterator[Predictions]:
    """Predictions under each of `count` protocols, from those of all views (`mm_moe.data.views`).

    A view that came several times counts with the mean of its logits.

    They are what `predict` gives for one protocol alone, if no row of a batch depends on another
    (`mm_moe.moe.layer.couples_samples`).
    """
    found = averaged(found)
    keys = [read_key(key) for key in found.ids]
    order = sorted(range(len(keys)), key=lambda row: keys[row][0])
    for protocol in range(count):
        rows = [row for row in order if protocol in keys[row][1]]
        yield Predictions(
            [keys[row][0] for row in rows],
            found.logits[rows],
            found.labels[rows],
            found.present[rows],
        )


def _labels(batch: Batch) -> np.ndarray:
    """The labels of a batch; without any, one mark per row that says so."""
    if batch.labels is None:
        return np.full(len(batch.ids), IGNORED_LABEL)
    return batch.labels.cpu().numpy()


def _floats_as(batch: Batch, dtype: torch.dtype) -> Batch:
    """Cast the payloads to the model's dtype; labels keep theirs."""
    found = Batch.of(batch.ids, batch.present, _cast(batch.inputs, dtype), batch.labels)
    if "supports" in batch:
        found["supports"] = _cast(batch["supports"], dtype)
    return found


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors of nested dicts as `dtype`."""
    if isinstance(value, dict):
        return {key: _cast(entry, dtype) for key, entry in value.items()}
    return value.to(dtype) if value.is_floating_point() else value
