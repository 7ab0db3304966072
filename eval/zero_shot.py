"""Zero-shot scores of a model with an image and a text tower: retrieval and classification.

The names of metrics and columns are those of `clip-benchmark`, so that tables can be joined.

N samples, K keys, C classes, D joint width.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from mm_moe.batch import TEXT, Batch, Sample
from mm_moe.errors import ConfigError, DataError
from mm_moe.training import runtime
from mm_moe.training.embed import embed

RECALL_AT = (1, 5, 10)
CHUNK = 1024  # queries scored at once
TEMPLATES = ("{}", "a picture of {}", "a drawing of {}", "an icon of {}", "a photo of {}")
COLUMNS = ("dataset", "model", "pretrained", "task", "language", "num_rows")


def ranks_of(
    query_ND: np.ndarray, key_KD: np.ndarray, query_group: np.ndarray, key_group: np.ndarray
) -> np.ndarray:
    """Place, from 0, of each query's best matching key among the keys that do not match it.

    Args:
        query_ND: unit-length features.
        key_KD: unit-length features.
        query_group: int (N,); keys of the same group match. Every query has at least one.
        key_group: int (K,).

    Returns:
        Int (N,). A key that ties with the match counts as before it, so that a model that gives
        everything the same feature finds nothing.
    """
    found = np.empty(len(query_ND), dtype=np.int64)
    for start in range(0, len(query_ND), CHUNK):
        part = slice(start, start + CHUNK)
        score_NK = similarity(query_ND[part], key_KD)
        match_NK = query_group[part, None] == key_group[None]
        best_N = np.where(match_NK, score_NK, -np.inf).max(1)
        found[part] = ((score_NK >= best_N[:, None]) & ~match_NK).sum(1)
    return found


def similarity(left_ND: np.ndarray, right_KD: np.ndarray) -> np.ndarray:
    """How close each left one is to each right one (N, K).

    A side whose features are Q times as wide holds Q vectors of one length, such as BLIP-2's
    queries of an image: the closest of them counts.
    """
    width = min(left_ND.shape[1], right_KD.shape[1])
    if not width:
        return left_ND @ right_KD.T
    best_NK = np.full((len(left_ND), len(right_KD)), -np.inf, dtype=left_ND.dtype)
    for left in range(0, left_ND.shape[1], width):
        for right in range(0, right_KD.shape[1], width):
            score_NK = left_ND[:, left : left + width] @ right_KD[:, right : right + width].T
            np.maximum(best_NK, score_NK, out=best_NK)
    return best_NK


def retrieval(image_ND: np.ndarray, text_ND: np.ndarray, captions: Sequence[str]) -> dict:
    """Recall at 1, 5 and 10 of texts for images and of images for texts. A collective.

    Equal captions are one text, all of whose images are right: a hit is any right one among the
    first k (as in papers on CLIP). Each rank scores its share of the queries.

    Args:
        image_ND: unit-length features of pairs.
        text_ND: theirs.
        captions: N texts, the same on every rank.

    Returns:
        "text_retrieval_recall@k" (image to text), "image_retrieval_recall@k" (text to image).

    Raises:
        DataError: no pair.
    """
    if not captions:
        raise DataError("no sample has both an image and a text: nothing to retrieve.")
    _, first, group_N = np.unique(np.asarray(captions), return_index=True, return_inverse=True)
    unique_KD, unique_K = text_ND[first], group_N[first]
    rank, world = runtime.rank(), runtime.world_size()
    to_text = ranks_of(image_ND[rank::world], unique_KD, group_N[rank::world], unique_K)
    to_image = ranks_of(unique_KD[rank::world], image_ND, unique_K[rank::world], group_N)
    everyone = runtime.gather_objects((to_text, to_image))
    metrics = {}
    for place, kind in enumerate(("text", "image")):
        ranks = np.concatenate([found[place] for found in everyone])
        for k in RECALL_AT:
            metrics[f"{kind}_retrieval_recall@{k}"] = float((ranks < k).mean())
    return metrics


def classification(image_ND: np.ndarray, class_CD: np.ndarray, labels: np.ndarray) -> dict:
    """Accuracy of the nearest class, among the nearest five, and mean recall per class.

    Args:
        image_ND: unit-length features.
        class_CD: unit-length features of the class names.
        labels: int (N,).
    """
    score_NC = similarity(image_ND, class_CD)
    own_N = score_NC[np.arange(len(labels)), labels]
    ties_NC = (score_NC >= own_N[:, None]).sum(1) - 1  # classes before or beside the right one
    right_N = ties_NC < 1
    metrics = {"acc1": float(right_N.mean())}
    if score_NC.shape[1] > 5:
        metrics["acc5"] = float((ties_NC < 5).mean())
    recalls = [right_N[labels == c].mean() for c in np.unique(labels)]
    metrics["mean_per_class_recall"] = float(np.mean(recalls))
    return metrics


def read_templates(path: str | None) -> tuple[str, ...]:
    """Prompt templates, one a line with {} for the class name; without a file a few plain ones.

    Raises:
        ConfigError: no such file, no line, or a line without {}.
    """
    if path is None:
        return TEMPLATES
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--zero_shot_templates {path!r} cannot be read ({type(error).__name__}); give a text "
            "file with one template a line."
        ) from error
    lines = [line.strip() for line in lines if line.strip()]
    for line in lines:
        if line.count("{}") != 1:
            raise ConfigError(
                f"--zero_shot_templates {path!r}: {line!r} must have {{}} exactly once, where the "
                "class name goes."
            )
    if not lines:
        raise ConfigError(
            f"--zero_shot_templates {path!r} is empty; write 'a photo of {{}}' in it."
        )
    return tuple(lines)


def class_samples(names: Sequence[str], templates: Sequence[str]) -> list[Sample]:
    """Every class name in every template, as samples of text alone; the id tells the class."""
    return [
        Sample(f"{c:06d}/{t:04d}", {TEXT: template.replace("{}", name.replace("_", " "))})
        for c, name in enumerate(names)
        for t, template in enumerate(templates)
    ]


def class_features(
    model: nn.Module,
    collate: Callable[[list[Sample]], Batch],
    *,
    names: Sequence[str],
    templates: Sequence[str],
    modalities: tuple[str, ...],
    batch_size: int,
) -> np.ndarray:
    """Unit-length feature (C, D) of each class: the mean over templates. A collective."""
    mine = class_samples(names, templates)[runtime.rank() :: runtime.world_size()]
    starts = range(0, len(mine), batch_size)
    batches = (collate(mine[start : start + batch_size]) for start in starts)
    found = embed(model, batches, modalities=modalities)[TEXT]
    mean_CD = found.features.reshape(len(names), len(templates), -1).mean(1)
    return mean_CD / np.linalg.norm(mean_CD, axis=1, keepdims=True).clip(1e-12)


@dataclass(frozen=True)
class ZeroShotRow:
    """One task's scores.

    Attributes:
        dataset: its name.
        task: "zeroshot_retrieval" or "zeroshot_classification".
        num_rows: images scored.
        metrics: by name, shares of 1.
        chance: the same of a model that guesses.
    """

    dataset: str
    task: str
    num_rows: int
    metrics: dict[str, float]
    chance: dict[str, float]


def retrieval_chance(captions: Sequence[str]) -> dict[str, float]:
    """Expected recall of a random order."""
    _, counts = np.unique(np.asarray(captions), return_counts=True)
    images, texts = int(counts.sum()), len(counts)
    chance = {}
    for k in RECALL_AT:
        chance[f"text_retrieval_recall@{k}"] = min(1.0, k / texts)
        misses = np.ones(texts)
        for draw in range(min(k, images)):
            misses *= np.clip((images - counts - draw) / (images - draw), 0, 1)
        chance[f"image_retrieval_recall@{k}"] = float(1 - misses.mean())
    return chance


def format_rows(rows: Iterable[ZeroShotRow]) -> str:
    """A table for the terminal: percent, and chance beside."""
    lines = [f"{'zero-shot':44}{'score':>8}{'chance':>8}"]
    for row in rows:
        for name, value in row.metrics.items():
            label = f"{row.dataset} {name} ({row.num_rows:,} images)"
            chance = row.chance.get(name)
            beside = "" if chance is None else f"{100 * chance:8.1f}"
            lines.append(f"{label:44}{100 * value:8.1f}{beside}")
    return "\n".join(lines)


def write_csv(rows: Sequence[ZeroShotRow], path: Path, *, model: str, pretrained: str) -> None:
    """The rows as `clip-benchmark` writes its tables: a column for each metric of any row."""
    names = list(dict.fromkeys(name for row in rows for name in row.metrics))
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w", newline="") as stream:
        table = csv.DictWriter(stream, [*COLUMNS, *names])
        table.writeheader()
        for row in rows:
            entry: dict[str, Any] = {"dataset": row.dataset, "model": model, "task": row.task}
            entry |= {"pretrained": pretrained, "language": "en", "num_rows": row.num_rows}
            table.writerow(entry | row.metrics)
    aside.replace(path)
