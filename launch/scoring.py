"""Scores a model on a split of a data set under every missing condition."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn
from torch.utils.data import DataLoader

from eval.patterns import ConditionScore, evaluate_conditions
from mm_moe.data.collate import Collator, Interactions, Missing
from mm_moe.data.schema import ONE_VALUE, DataSource
from mm_moe.data.streaming import SampleStream
from mm_moe.data.support_batch import Supports
from mm_moe.data.table import MissingTable
from mm_moe.data.views import ViewCollator, ViewStream
from mm_moe.moe.layer import couples_samples
from mm_moe.training import runtime
from mm_moe.training.predict import Predictions, by_protocol, predict
from mm_moe.training.preemption import StopSignals

DEFAULT_MIXED_RATIO = 0.5  # of the mixed test condition, for a run without imposed missingness


@dataclass
class Scorer:
    """A model with the data that it is scored on; the same code for one process and for many.

    Attributes:
        model: whole, or spread over the ranks.
        source: the data set.
        processors: modality -> function from raw values to tensors.
        batch_size: samples per process and forward pass.
        max_bad_samples: undecodable samples that are borne.
        tables: split -> stored missing table, scored as one more condition of that split.
        bad_ids: the ids of those, over all ranks.
        supports: training rows for a fill that asks for them.
        signals: of this process; one that asks it to stop cuts a scoring short on all ranks.
    """

    model: nn.Module
    source: DataSource
    processors: dict[str, Callable[[list[Any]], dict]]
    batch_size: int
    max_bad_samples: int
    tables: dict[str, MissingTable] = field(default_factory=dict)
    bad_ids: list[str] = field(default_factory=list)
    signals: StopSignals | None = None
    supports: Supports | None = None

    def collator(
        self, missing: Missing | None, *, interactions: Interactions | None = None
    ) -> Collator:
        """Turns samples into batches under a protocol; `interactions` are for training alone."""
        return Collator(
            modalities=self.source.modalities,
            processors=self.processors,
            problem_type=self.source.problem_type,
            num_labels=num_outputs(self.source),
            missing=missing,
            vectors=self.source.sequences,
            max_bad_samples=self.max_bad_samples,
            interactions=interactions,
            remote=self.source.remote,
            supports=self.supports,
        )

    def predict(self, missing: Missing | None, split: str) -> Predictions:
        """Predictions for a split, each sample once over the ranks. A collective."""
        if self._draws > 1:
            return next(iter(self._predict_views([missing], split)))
        collator = self.collator(missing)
        loader = DataLoader(self._stream(split), batch_size=self.batch_size, collate_fn=collator)
        found = predict(
            self.model, loader, num_modalities=len(self.source.modalities), signals=self.signals
        )
        self.note_bad(collator)
        return found

    def predict_all(self, protocols: Sequence[Missing | None], split: str) -> Iterable[Predictions]:
        """The predictions of `predict` under each protocol, in order. A collective.

        The model sees each different remainder of a sample once, however many protocols leave it;
        where rows of a batch depend on each other, every protocol takes its own pass.

        A fill that draws more than once for a sample (`Supports.num_draws`) is asked about what
        lacks something as often, and its logits are averaged: multiple imputation.
        """
        if couples_samples(self.model):
            return (self.predict(missing, split) for missing in protocols)
        return self._predict_views(protocols, split)

    def _predict_views(
        self, protocols: Sequence[Missing | None], split: str
    ) -> Iterable[Predictions]:
        modalities, collator = self.source.modalities, self.collator(None)
        stream = ViewStream(
            self._stream(split), protocols=protocols, modalities=modalities, draws=self._draws
        )
        loader = DataLoader(stream, self.batch_size, collate_fn=ViewCollator(collator))
        found = predict(self.model, loader, num_modalities=len(modalities), signals=self.signals)
        self.note_bad(collator)
        return by_protocol(found, count=len(protocols))

    @property
    def _draws(self) -> int:
        return 1 if self.supports is None else self.supports.num_draws

    def _stream(self, split: str) -> SampleStream:
        """This rank's samples of one pass over a split."""
        return SampleStream(
            self.source,
            split=split,
            batch_size=self.batch_size,
            rank=runtime.rank(),
            world_size=runtime.world_size(),
            epochs=1,
        )

    def note_bad(self, collator: Collator) -> None:
        """Remember the ids that did not decode on any rank. A collective."""
        for ids in runtime.gather_objects(sorted(collator.bad_ids)):
            self.add_bad(ids)

    def add_bad(self, ids: Iterable[str]) -> None:
        """Remember ids, the same on every rank."""
        self.bad_ids += [sample for sample in ids if sample not in self.bad_ids]

    def score(
        self,
        *,
        prior: np.ndarray,
        split: str,
        ratio: float,
        seed: int,
        patterns: Sequence[str] | None = None,
        num_resamples: int = 500,
        keep: Callable[[str, Predictions], None] | None = None,
    ) -> list[ConditionScore]:
        """One row per missing condition. A collective.

        Args:
            prior: what the training labels say (see `train_prior`).
            split: the split to score.
            ratio: share of samples that lack something in the mixed condition; 0 takes the default.
            seed: of the missing masks.
            patterns: the conditions, where others than the usual ones are wanted ("both:0.7").
            num_resamples: of the bootstrap intervals; 0 leaves them out.
            keep: called with each condition and its predictions.
        """
        group_of = None
        if num_resamples:
            group_of = {sample.id: sample.group_key for sample in self.source.index(split)}
        return evaluate_conditions(
            self.predict_all,
            source=self.source,
            modalities=self.source.modalities,
            num_labels=num_outputs(self.source),
            prior=prior,
            ratio=ratio or DEFAULT_MIXED_RATIO,
            split=split,
            seed=seed,
            patterns=patterns,
            stored=self.tables.get(split),
            num_resamples=num_resamples,
            group_of=group_of,
            keep=keep,
        )


def num_outputs(source: DataSource) -> int:
    """Values that a head gives for each sample: one per class, one for a number or a risk."""
    return 1 if source.problem_type in ONE_VALUE else len(source.label_names)


def train_prior(source: DataSource, split: str) -> np.ndarray:
    """What the training labels say, for the chance levels: counts, shares, or the mean (1,)."""
    labels = [sample.label for sample in source.index(split) if sample.label is not None]
    if source.problem_type == "single_label_classification":
        return np.bincount(labels, minlength=len(source.label_names))
    if labels and isinstance(labels[0], Mapping):
        total = np.zeros(len(source.label_names))
        for label in labels:
            np.add.at(total, list(label), list(label.values()))
        return total / len(labels)
    return np.atleast_1d(np.asarray(labels, dtype=float).mean(axis=0))
