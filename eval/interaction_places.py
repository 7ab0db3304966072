"""Where published artefacts of interaction experts lie, and what they say about categories.

C classes, K categories.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from eval.interaction_fusion import label_frequencies
from mm_moe.data.interactions.categories import NONE, categorise, coarse_codes
from mm_moe.data.interactions.published import (
    CATEGORIES,
    PublishedFolder,
    labels_name,
    read_split,
    split_name,
)
from mm_moe.errors import DataError

T = TypeVar("T")
NUM_CLASSES = 2
GOLD_KEYS = ("label", "sarcasm")  # of a raw record
OUTPUTS = "expert_inference_output"


@dataclass(frozen=True)
class Place:
    """One expert folder of one data set."""

    dataset: str
    folder: Path
    title: str


@dataclass(frozen=True)
class Categories:
    """What is known of the categories of a data set.

    Attributes:
        test: id -> place in `CATEGORIES`; None: not known.
        prior_KC: label frequencies of the training samples of each category; None: not known.
        notes: how they were found.
        failures: what of them could not be read -> why.
    """

    test: Mapping[str, int] | None
    prior_KC: np.ndarray | None
    notes: tuple[str, ...] = ()
    failures: Mapping[str, str] = field(default_factory=dict)


def places(folder: Path, dataset: str) -> Iterator[Place]:
    """The expert folders that hold any logits of a data set, by name."""
    bases = [folder, *sorted(folder.glob(f"*{OUTPUTS}*"))]
    bases += sorted((folder / f"{dataset}_data").glob(f"*{OUTPUTS}*"))
    found = [path for base in bases for path in sorted(base.glob("expert_*")) if path.is_dir()]
    found += [folder] if folder.resolve().name.startswith("expert_") else []
    for path in found:
        if any(path.glob(f"{dataset}_*_logits*.jsonl")):
            name = folder.resolve().name if path == folder else str(path.relative_to(folder))
            yield Place(dataset, path, f"{dataset}: {name}")


def roots(folder: Path) -> list[Path]:
    """Where the other published files may lie: the folder, and above where it is a part of them."""
    resolved = folder.resolve()
    above = [path.parent for path in (resolved, resolved.parent) if OUTPUTS in path.name]
    return [folder, *above]


def categories_of(folder: Path, dataset: str) -> Categories:
    """The categories of the test samples, and the training label frequencies of each.

    They are those of `data_split_output`; without it they are made from the unimodal predictions in
    `data_gen_output`. Where both are there a note tells how many agree. Where a file deviates or
    only some of the three are there, that source is left out and stands among the failures: the
    logits can be scored without it.
    """
    failures: dict[str, str] = {}
    for root in roots(folder):
        files = PublishedFolder(root, dataset)
        split = _tried(_split_categories, files, "test categories", failures)
        made = _tried(_made_categories, files, "unimodal predictions", failures)
        if split is None and made is None:
            continue
        notes = []
        if split is None:
            notes.append("test categories from the unimodal predictions; there are no split files")
        elif made is not None:
            same = sum(made.get(one) == category for one, category in split.items())
            notes.append(
                f"test categories from the split files; {same} of {len(split)} equal those from "
                "the unimodal predictions"
            )
        prior_KC = _tried(_train_prior, files, "training categories", failures)
        return Categories(made if split is None else split, prior_KC, tuple(notes), failures)
    return Categories(None, None, failures=failures)


def _tried(
    read: Callable[[PublishedFolder], T | None],
    files: PublishedFolder,
    what: str,
    failures: dict[str, str],
) -> T | None:
    """What `read` finds; None where it fails, with the reason among the failures."""
    try:
        return read(files)
    except DataError as error:
        failures[f"{files.dataset}: {what}"] = str(error)
        return None


def _has_split(files: PublishedFolder, split: str) -> bool:
    names = (split_name(files.dataset, category, split) for category in CATEGORIES)
    return any(files.find("data_split_output", name) for name in names)


def _split_categories(files: PublishedFolder) -> dict[str, int] | None:
    if not _has_split(files, "test"):
        return None
    return {one: CATEGORIES.index(name) for one, name in files.split_ids("test").items()}


def _made_categories(files: PublishedFolder) -> dict[str, int] | None:
    """Categories of all samples that both labellers have an answer for; None without labellers."""
    names = [labels_name(files.dataset, modality) for modality in ("text", "image")]
    if not all(files.find("data_gen_output", name) for name in names):
        return None
    text, image = (files.labels(modality) for modality in ("text", "image"))
    of_image = dict(zip(image.ids, zip(image.prediction_N, image.gold_N, strict=True), strict=True))
    rows = [
        (one, said, *of_image[one], gold)
        for one, said, gold in zip(text.ids, text.prediction_N, text.gold_N, strict=True)
        if one in of_image
    ]
    for one, _, _, image_gold, text_gold in rows:
        if image_gold != text_gold:
            raise DataError(
                f"data_gen_output of {files.dataset!r}: id {one!r}: key 'gth' is {image_gold} for "
                f"the image, {text_gold} for the text."
            )
    if not rows:
        return {}
    ids, said_text, said_image, gold, _ = zip(*rows, strict=True)
    code_N = categorise([np.array(said_text), np.array(said_image)], labels=np.array(gold))
    coarse_N = coarse_codes(code_N, num_modalities=2)
    return {one: int(code) for one, code in zip(ids, coarse_N, strict=True) if code != NONE}


def _train_prior(files: PublishedFolder) -> np.ndarray | None:
    """Label frequencies of the training samples of each category; None without split files."""
    if not _has_split(files, "train"):
        return None
    labels: list[int] = []
    category: list[int] = []
    for index, name in enumerate(CATEGORIES):
        path = files.need("data_split_output", split_name(files.dataset, name, "train"))
        for one, record in read_split(path).items():
            labels.append(_gold(path, one, record))
            category.append(index)
    return label_frequencies(
        np.array(labels, dtype=int),
        np.array(category, dtype=int),
        num_experts=len(CATEGORIES),
        num_classes=NUM_CLASSES,
    )


def _gold(path: Path, one: str, record: Mapping[str, Any]) -> int:
    """The label of a raw record."""
    value = next((record[key] for key in GOLD_KEYS if key in record), None)
    if value not in (0, 1):
        raise DataError(
            f"{path}: id {one!r}: key {' or '.join(map(repr, GOLD_KEYS))} must be 0, 1, false or "
            f"true, is {value!r}."
        )
    return int(value)
