"""Zero-shot scores of runs without task labels, during training, at its end and alone."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from torch.utils.data import DataLoader

from eval.zero_shot import (
    ZeroShotRow,
    class_features,
    classification,
    format_rows,
    read_templates,
    retrieval,
    retrieval_chance,
    write_csv,
)
from mm_moe.arguments import parse_json
from mm_moe.batch import IMAGE, TEXT, Batch, Sample
from mm_moe.data.collate import Collator
from mm_moe.data.schema import NO_LABEL, SINGLE_LABEL, DataSource
from mm_moe.data.streaming import SampleStream
from mm_moe.data.unlabelled import Unlabelled
from mm_moe.errors import ConfigError
from mm_moe.registry import DATASETS, OBJECTIVES
from mm_moe.training import runtime
from mm_moe.training.embed import Embedded, embed

PAIR = {IMAGE, TEXT}


def as_objective_sees(source: DataSource, objective: str) -> DataSource:
    """A data set without its labels, where the objective does not use any."""
    # an objective from outside need not say
    uses_labels = getattr(OBJECTIVES.resolve(objective), "uses_labels", True)
    return source if uses_labels or source.problem_type == NO_LABEL else Unlabelled(source)


def has_pairs(source: DataSource) -> bool:
    """Whether a data set without task labels has images and texts, and so zero-shot scores."""
    return source.problem_type == NO_LABEL and set(source.modalities) == PAIR


class Remembering:
    """A collator that remembers what its samples say of themselves: id -> caption or label.

    Args:
        collator: the collator.
        note: what of a sample to remember.
        keep: modalities that reach the model, or None for all.
    """

    def __init__(
        self,
        collator: Collator,
        note: Callable[[Sample], Any],
        *,
        keep: tuple[str, ...] | None = None,
    ) -> None:
        self.collator, self.note, self.keep = collator, note, keep
        self.noted: dict[str, Any] = {}

    def __call__(self, samples: list[Sample]) -> Batch:
        """The batch."""
        self.noted |= {sample.id: self.note(sample) for sample in samples}
        if self.keep is not None:
            samples = [
                replace(
                    sample,
                    payload={k: v for k, v in sample.payload.items() if k in self.keep},
                    label=None,
                )
                for sample in samples
            ]
        return self.collator(samples)

    def everyone(self) -> dict[str, Any]:
        """What all ranks remember. A collective."""
        parts = runtime.gather_objects(self.noted)
        return {sample: note for part in parts for sample, note in part.items()}


@dataclass
class ZeroShot:
    """A model with the data that it is scored on without training for them.

    Attributes:
        model: with an image and a text tower; whole, or spread over the ranks.
        source: pairs of image and text.
        processors: modality -> function from raw values to tensors.
        batch_size: samples per process and forward pass.
        max_bad_samples: undecodable samples that are borne.
        classes: a labelled data set with images to classify, or None.
        templates: texts around a class name.
    """

    model: nn.Module
    source: DataSource
    processors: dict[str, Callable[[list[Any]], dict]]
    batch_size: int
    max_bad_samples: int
    classes: DataSource | None
    templates: tuple[str, ...]

    def rows(self, split: str) -> list[ZeroShotRow]:
        """Retrieval in a split of the pairs, and classification in that of the classes.

        A collective. The classes' data set is scored in the split of that name, or in "test".
        """
        rows = [self._retrieval(split)]
        if self.classes is not None:
            own = split if split in self.classes.splits() else "test"
            rows.append(self._classification(self.classes, own))
        return rows

    def _collator(self) -> Collator:
        return Collator(
            modalities=self.source.modalities,
            processors=self.processors,
            problem_type=NO_LABEL,
            num_labels=0,
            max_bad_samples=self.max_bad_samples,
        )

    def _embed(
        self, source: DataSource, split: str, collate: Remembering
    ) -> tuple[dict[str, Embedded], dict[str, Any]]:
        stream = SampleStream(
            source,
            split=split,
            batch_size=self.batch_size,
            rank=runtime.rank(),
            world_size=runtime.world_size(),
            epochs=1,
        )
        loader = DataLoader(stream, self.batch_size, collate_fn=collate)
        found = embed(self.model, loader, modalities=self.source.modalities)
        return found, collate.everyone()

    def _retrieval(self, split: str) -> ZeroShotRow:
        found, captions = self._embed(
            self.source, split, Remembering(self._collator(), caption_hash)
        )
        both = sorted(set(found[IMAGE].ids) & set(found[TEXT].ids))
        own = [captions[sample] for sample in both]
        metrics = retrieval(found[IMAGE].of(both), found[TEXT].of(both), own) if both else {}
        chance = retrieval_chance(own) if both else {}
        return ZeroShotRow(self.source.name, "zeroshot_retrieval", len(both), metrics, chance)

    def _classification(self, classes: DataSource, split: str) -> ZeroShotRow:
        remember = Remembering(self._collator(), lambda sample: sample.label, keep=(IMAGE,))
        found, labels = self._embed(classes, split, remember)
        ids = [sample for sample in found[IMAGE].ids if labels[sample] is not None]
        class_CD = class_features(
            self.model,
            self._collator(),
            names=classes.label_names,
            templates=self.templates,
            modalities=self.source.modalities,
            batch_size=self.batch_size,
        )
        wanted = np.array([labels[sample] for sample in ids], dtype=np.int64)
        metrics = classification(found[IMAGE].of(ids), class_CD, wanted) if ids else {}
        count = len(classes.label_names)
        chance = {"acc1": 1 / count, "acc5": min(1, 5 / count), "mean_per_class_recall": 1 / count}
        return ZeroShotRow(classes.name, "zeroshot_classification", len(ids), metrics, chance)


def caption_hash(sample: Sample) -> str:
    """What tells equal captions: a hash, so that no text leaves its rank."""
    return hashlib.blake2b(str(sample.payload.get(TEXT)).encode(), digest_size=16).hexdigest()


def classes_of(arguments: Mapping[str, Any], source: DataSource) -> DataSource | None:
    """The labelled data set whose images are classified: a named one, or the run's own.

    Args:
        arguments: a run's, by name.
        source: its data set.

    Raises:
        ConfigError: a data set without classes or images.
    """
    name = arguments.get("zero_shot_dataset")
    if not name:
        own = source.source if isinstance(source, Unlabelled) else None
        return own if own is not None and own.problem_type == SINGLE_LABEL else None
    options = parse_json("zero_shot_options", arguments.get("zero_shot_options"))
    try:
        classes = DATASETS.resolve(name)(arguments.get("zero_shot_data_dir"), **options)
    except TypeError as error:
        raise ConfigError(f"--zero_shot_options for {name!r}: {error}.") from error
    if classes.problem_type != SINGLE_LABEL or IMAGE not in classes.modalities:
        raise ConfigError(
            f"--zero_shot_dataset {name!r} must have images with one class each; it has "
            f"{', '.join(classes.modalities)} and is {classes.problem_type}."
        )
    return classes


def check_zero_shot(values: argparse.Namespace, source: DataSource) -> None:
    """Refuse zero-shot settings that cannot work, before anything is trained.

    Raises:
        ConfigError: a wrong data set or template file, or a run that has no zero-shot scores.
    """
    if not has_pairs(source):
        for flag in ("zero_shot_dataset", "zero_shot_templates"):
            if getattr(values, flag):
                raise ConfigError(
                    f"--{flag} {getattr(values, flag)!r} is for objectives without labels on "
                    "images and texts, such as --objective contrastive; leave it out."
                )
        return
    read_templates(values.zero_shot_templates)
    classes_of(vars(values), source)


def zero_shot_of(
    arguments: Mapping[str, Any],
    source: DataSource,
    *,
    model: nn.Module,
    processors: dict[str, Callable[[list[Any]], dict]],
    batch_size: int,
) -> ZeroShot:
    """The scorer that a run's arguments ask for."""
    return ZeroShot(
        model,
        source,
        processors,
        batch_size=batch_size,
        max_bad_samples=arguments["max_bad_samples"],
        classes=classes_of(arguments, source),
        templates=read_templates(arguments.get("zero_shot_templates")),
    )


def flat(rows: list[ZeroShotRow]) -> dict[str, float]:
    """The scores of all tasks by "DATASET_METRIC", for a training log."""
    return {f"{row.dataset}_{name}": value for row in rows for name, value in row.metrics.items()}


def scored_split(source: DataSource, *wanted: str) -> str | None:
    """The first of some splits that a data set has."""
    return next((split for split in wanted if split in source.splits()), None)


def write_rows(rows: list[ZeroShotRow], folder: Path, *, split: str, pretrained: str) -> None:
    """Write `zero_shot-SPLIT.json` and `.csv` (the columns of `clip-benchmark`), and print."""
    document = {"split": split, "rows": [asdict(row) for row in rows]}
    target = folder / f"zero_shot-{split}.json"
    aside = target.with_name(target.name + ".tmp")
    aside.write_text(json.dumps(document, indent=1))
    aside.replace(target)
    write_csv(rows, target.with_suffix(".csv"), model=folder.name, pretrained=pretrained)
    print(format_rows(rows))
    print(f"written to {target} and .csv")
