"""A table as the published JSON files, so that the published code reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mm_moe.batch import IMAGE, TEXT
from mm_moe.data.interactions import published
from mm_moe.data.interactions.categories import COARSE, NONE
from mm_moe.data.interactions.hard_labels import SENTINEL, UniScores
from mm_moe.data.interactions.published import UnimodalLabels
from mm_moe.data.interactions.strict_json import read_records
from mm_moe.data.interactions.table import InteractionTable
from mm_moe.data.schema import DataSource
from mm_moe.errors import ConfigError, DataError


def export_published(
    table: InteractionTable,
    scores: Mapping[str, Mapping[str, UniScores]],
    source: DataSource,
    *,
    folder: Path,
    raw: Path | None = None,
) -> None:
    """Write `{set}_data/data_gen_output` and `data_split_output` below a folder.

    Rows without a prediction are left out of a modality's labels, and rows without category out of
    the split files. A split file's records are those of the raw tables, or the texts and the label.

    Args:
        table: the categories.
        scores: modality -> split -> scores, as the table was made from.
        source: the data set, for the texts.
        folder: where to write.
        raw: folder of `{set}_dataset_{split}.json`.

    Raises:
        ConfigError: the published layout has no place for these modalities, classes or splits.
        DataError: the raw tables lack a sample.
    """
    check_exportable(source, modalities=table.modalities, splits=table.splits, raw=raw)
    root = folder / f"{table.dataset}_data"
    for modality in table.modalities:
        path = root / "data_gen_output" / published.labels_name(table.dataset, modality)
        published.write_labels(path, _labels(table, scores[modality], modality))
    for split in dict.fromkeys(table.splits):
        _write_split(table, source, split, root=root, raw=raw)


def check_exportable(
    source: DataSource, *, modalities: Sequence[str], splits: Sequence[str], raw: Path | None
) -> None:
    """Refuse what the published layout has no place for, before anything is written.

    Raises:
        ConfigError: other modalities, classes or splits.
        DataError: a raw table is not there.
    """
    if set(modalities) != {IMAGE, TEXT} or len(source.label_names) != 2:
        raise ConfigError(
            f"the published layout is for image and text and two classes; {source.name!r} has "
            f"{', '.join(modalities)} and {len(source.label_names)} classes. Leave out "
            "--write_published."
        )
    other = sorted(set(splits) - set(published.SPLITS))
    if other:
        raise ConfigError(
            f"the published layout has no split {', '.join(other)}; leave it out of --splits, or "
            "leave out --write_published."
        )
    for split in dict.fromkeys(splits) if raw is not None else ():
        if not (path := _raw_table(raw, source, split)).is_file():
            raise DataError(f"--raw: {path} is not there; name the folder of the raw tables.")


def _raw_table(raw: Path | None, source: DataSource, split: str) -> Path:
    return (raw or Path()) / f"{source.name}_dataset_{published.SPLITS[split]}.json"


def _labels(
    table: InteractionTable, scores: Mapping[str, UniScores], modality: str
) -> UnimodalLabels:
    score_N2 = np.concatenate([scores[split].score_NC for split in dict.fromkeys(table.splits)])
    prediction_N = table.predictions[modality]
    said_N = (prediction_N != NONE) & (table.label_N != NONE)
    ids = tuple(i for i, said in zip(table.ids, said_N, strict=True) if said)
    score_N2 = np.nan_to_num(score_N2, nan=SENTINEL)
    return UnimodalLabels(ids, score_N2[said_N], table.label_N[said_N], prediction_N[said_N])


def _write_split(
    table: InteractionTable, source: DataSource, split: str, *, root: Path, raw: Path | None
) -> None:
    category_of = {
        table.ids[n]: COARSE[table.coarse_N[n]]
        for n in table.rows_of(split)
        if table.code_N[n] != NONE
    }
    parts: dict[str, dict[str, Any]] = {name: {} for name in published.CATEGORIES}
    for sample_id, record in _records(source, split, raw=raw):
        if sample_id in category_of:
            parts[category_of.pop(sample_id)][sample_id] = record
    if category_of:
        raise DataError(
            f"{len(category_of)} samples of split {split!r} have no record in {str(raw)!r}, first "
            f"{next(iter(category_of))!r}; name the raw tables of the same data with --raw."
        )
    for category, records in parts.items():
        name = published.split_name(table.dataset, category, split)
        published.write_split(root / "data_split_output" / name, records)


def _records(
    source: DataSource, split: str, *, raw: Path | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    if raw is not None:
        for entry in read_records(_raw_table(raw, source, split)):
            yield entry.name, entry.value
        return
    for row in source.stream(split):
        sample = source.to_sample(row)
        texts = {n: value for n, value in sample.payload.items() if isinstance(value, str)}
        texts.pop(IMAGE, None)  # a path
        yield sample.id, {**texts, "label": sample.label}
