"""Published score files as labellers, joined to the data set by id.

The modalities are those of the files: the data set gives ids, labels and splits, and may lack what
the labellers saw (the frames of MUStARD, which nobody may share).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mm_moe.batch import IMAGE, TEXT, Sample
from mm_moe.data.interactions.categories import NONE
from mm_moe.data.interactions.hard_labels import UniScores
from mm_moe.data.interactions.published import PublishedFolder, UnimodalLabels, read_labels
from mm_moe.data.interactions.table import NAMED
from mm_moe.data.reading import file_sha256
from mm_moe.data.schema import DataSource
from mm_moe.errors import ConfigError, DataError


def add_flags(flags: argparse._ArgumentGroup) -> None:
    """The flags of this labeller."""
    flags.add_argument("--published", type=Path, help="folder of the published files")
    flags.add_argument("--for_fuser", action="store_true", help="take the files *_for_fuser.json")
    flags.add_argument("--labels", nargs="+", help="MODALITY=FILE for each modality, instead")


def label(
    options: argparse.Namespace, source: DataSource, samples: Mapping[str, list[Sample]]
) -> tuple[dict[str, dict[str, UniScores]], dict[str, dict[str, np.ndarray]], dict[str, Any]]:
    """Scores and stored predictions; a row that a file lacks has neither.

    Raises:
        ConfigError: no files, fewer than two, or other than two classes.
        DataError: a file deviates from its schema, knows no row, or has another label for one.
    """
    if len(source.label_names) != 2:
        raise ConfigError(
            f"published scores are of Yes and No; {source.name!r} has {len(source.label_names)} "
            "classes. Take another --labeller."
        )
    files, origin = _files(options, source.name)
    scores: dict[str, dict[str, UniScores]] = {}
    stored: dict[str, dict[str, np.ndarray]] = {}
    lacking = {}
    for modality, said in files.items():
        row_of = {sample_id: row for row, sample_id in enumerate(said.ids)}
        scores[modality], stored[modality] = {}, {}
        for split, rows in samples.items():
            place_N = np.array([row_of.get(sample.id, NONE) for sample in rows])
            _check_gold(said, rows, place_N, modality)
            none_N = place_N == NONE
            score_N2 = np.where(none_N[:, None], np.nan, said.score_N2[place_N])
            ids = tuple(sample.id for sample in rows)
            scores[modality][split] = UniScores(ids, modality, score_N2)
            stored[modality][split] = np.where(none_N, NONE, said.prediction_N[place_N])
            lacking[f"{modality}, {split}"] = int(none_N.sum())
        if all(lacking[f"{modality}, {split}"] == len(rows) for split, rows in samples.items()):
            some = next(iter(samples.values()))[:NAMED]
            raise DataError(
                f"the scores of {modality!r} have none of the data set's ids: it has "
                f"{', '.join(repr(sample.id) for sample in some)}, they have "
                f"{', '.join(map(repr, said.ids[:NAMED]))}."
            )
    return scores, stored, {**origin, "not_in_the_files": lacking}


def _files(
    options: argparse.Namespace, dataset: str
) -> tuple[dict[str, UnimodalLabels], dict[str, Any]]:
    """Modality -> its file's content."""
    if bool(options.published) == bool(options.labels):
        raise ConfigError(
            "--labeller files needs --published DIR, or --labels MODALITY=FILE for two or more."
        )
    if options.published:
        folder = PublishedFolder(options.published, dataset)
        found = {n: folder.labels(n, for_fuser=options.for_fuser) for n in (IMAGE, TEXT)}
        return found, {"for_fuser": options.for_fuser}
    given = dict(word.partition("=")[::2] for word in options.labels)
    if len(given) < 2 or len(given) != len(options.labels) or not all([*given, *given.values()]):
        raise ConfigError(
            "--labels must name a file for two or more modalities, each once, such as image=FILE "
            f"text=FILE; got {' '.join(options.labels)}."
        )
    found = {name: read_labels(Path(file)) for name, file in given.items()}
    return found, {"sha256": {name: file_sha256(Path(file)) for name, file in given.items()}}


def _check_gold(
    said: UnimodalLabels, rows: list[Sample], place_N: np.ndarray, modality: str
) -> None:
    other = [
        sample.id
        for sample, place in zip(rows, place_N, strict=True)
        if place != NONE and sample.label is not None and said.gold_N[place] != sample.label
    ]
    if other:
        raise DataError(
            f"the scores of {modality!r} have another label (gth) than the data set for "
            f"{len(other)} samples, first {', '.join(map(repr, other[:NAMED]))}; they are of other "
            "data."
        )
