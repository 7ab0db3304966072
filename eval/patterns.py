"""One trained model under every test condition: complete, each modality missing, and mixed.

The forward pass belongs to the caller (`predict`), so the same code scores one process or many.
N samples, M modalities.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from eval.chance import chance
from eval.metrics import has_label, headline, interval, scores
from mm_moe.data.collate import Missing
from mm_moe.data.missing import MissingProtocol
from mm_moe.data.schema import DataSource
from mm_moe.errors import ConfigError, DataError
from mm_moe.training.predict import Predictions

COMPLETE, MIXED, TABLE = "complete", "mixed", "table"  # the last: as a stored table says
MOST_IN_FULL = 4  # modalities; 14 sets of them short of all

Predict = Callable[[Sequence[Missing | None], str], Iterable[Predictions]]


@dataclass(frozen=True)
class ConditionScore:
    """Scores of one model under one test condition.

    Attributes:
        condition: "complete", "text missing", ..., "mixed".
        n: labelled samples that were scored.
        metrics: metric name -> value.
        chance: blind model -> metric name -> value (see `eval.chance.chance`).
        interval: 95% bootstrap interval of the headline metric over the samples; None: not asked.
    """

    condition: str
    n: int
    metrics: dict[str, float]
    chance: dict[str, dict[str, float]]
    interval: tuple[float, float] | None


def conditions(
    modalities: Sequence[str], *, dataset: str, split: str, ratio: float, seed: int = 0
) -> dict[str, MissingProtocol | None]:
    """The test conditions in the order of the table: complete, every set missing, and mixed.

    With more than four modalities only single ones are taken away, not every set.

    Args:
        modalities: the model's modalities. With only one there is nothing to take away.
        dataset: the source's name, key of the masks.
        split: the split that is scored, key of the masks.
        ratio: share of samples that lack one modality in the mixed condition (kind "both" or
            "any").
        seed: seed of the masks.

    Returns:
        Condition -> protocol; None leaves every sample as it is.
    """
    table: dict[str, MissingProtocol | None] = {COMPLETE: None}
    if len(modalities) < 2:
        return table
    key: dict[str, Any] = {"dataset": dataset, "split": split, "seed": seed}
    sizes = range(1, len(modalities)) if len(modalities) <= MOST_IN_FULL else [1]
    for lost in (lost for size in sizes for lost in reversed([*combinations(modalities, size)])):
        kind = "+".join(lost)
        table[f"{kind} missing"] = MissingProtocol(kind=kind, ratio=1.0, **key)
    if ratio > 0:
        kind = "both" if len(modalities) == 2 else "any"
        table[MIXED] = MissingProtocol(kind=kind, ratio=ratio, **key)
    return table


def parse_pattern(text: str) -> tuple[str, float]:
    """The missing kind and ratio of "complete" (or "none") or "KIND:RATIO", as in "both:0.7".

    "table", a stored table, is a kind by itself, of ratio 1.

    Raises:
        ConfigError: no such form, or a ratio outside [0, 1]. Whether the kind fits the data is for
            `MissingProtocol.check_kind` to say.
    """
    if text in (COMPLETE, "none"):
        return "none", 0.0
    if text == TABLE:
        return TABLE, 1.0
    kind, colon, number = text.rpartition(":")
    try:
        ratio = float(number)
    except ValueError:
        ratio = math.nan
    if not (colon and kind) or math.isnan(ratio):
        raise ConfigError(
            f"missing pattern {text!r} is neither {COMPLETE} nor KIND:RATIO nor {TABLE}; "
            "write both:0.7."
        )
    if not 0 <= ratio <= 1:
        raise ConfigError(
            f"missing pattern {text!r} has the ratio {number}, which must lie in [0, 1]: the share "
            f"of samples that lack something; try {kind}:{min(max(ratio, 0), 1):g}."
        )
    return ("none", 0.0) if kind == "none" or ratio == 0 else (kind, ratio)


def pattern_name(kind: str, ratio: float) -> str:
    """The one way to write a pattern: "complete", "both:0.7", "table"."""
    if kind == TABLE:
        return TABLE
    return COMPLETE if kind == "none" or ratio == 0 else f"{kind}:{ratio:g}"


def chosen_conditions(
    patterns: Sequence[str],
    *,
    modalities: Sequence[str],
    dataset: str,
    split: str,
    seed: int = 0,
    stored: Missing | None = None,
) -> dict[str, Missing | None]:
    """The test conditions that a user named, instead of those of `conditions`.

    Returns:
        Name of the pattern -> protocol, each once; None leaves every sample as it is.

    Args:
        patterns: in the words of `parse_pattern`.
        modalities: of the data.
        dataset: the source's name, key of the masks.
        split: the split that is scored, key of the masks.
        seed: seed of the masks.
        stored: the split's stored table, which the pattern "table" means.

    Raises:
        ConfigError: a pattern is malformed, its kind does not fit the modalities, or the split has
            no stored table.
    """
    table: dict[str, Missing | None] = {}
    for kind, ratio in map(parse_pattern, patterns):
        if kind == TABLE:
            if stored is None:
                raise ConfigError(
                    f"the pattern {TABLE!r} needs a stored table of the split {split!r}; name one "
                    f"with --missing_table {split}=FILE."
                )
            table[TABLE] = stored
            continue
        protocol = MissingProtocol(kind=kind, ratio=ratio, dataset=dataset, split=split, seed=seed)
        protocol.check_kind(modalities)
        name = pattern_name(kind, ratio)
        table[name] = None if name == COMPLETE else protocol
    return table


def evaluate_conditions(
    predict: Predict,
    *,
    source: DataSource,
    modalities: Sequence[str],
    num_labels: int,
    prior: np.ndarray,
    ratio: float,
    split: str = "test",
    seed: int = 0,
    patterns: Sequence[str] | None = None,
    stored: Missing | None = None,
    num_resamples: int = 500,
    group_of: Mapping[str, str] | None = None,
    keep: Callable[[str, Predictions], None] | None = None,
) -> list[ConditionScore]:
    """Score one model under all test conditions.

    Args:
        predict: (protocols, split) -> predictions of the whole split under each protocol, in
            order; None leaves every sample as it is. Called once, on every rank alike.
        source: names the masks and the kind of task.
        modalities: the model's modalities.
        num_labels: C.
        prior: what the training labels say (see `eval.chance.chance`).
        ratio: share of samples that lack something in the mixed condition.
        split: the split to score.
        seed: seed of the masks.
        patterns: the conditions, in the words of `parse_pattern`, instead of those of `conditions`.
        stored: a stored table of the split: the condition "table", last of the usual ones.
        num_resamples: of the bootstrap interval; 0 leaves it out.
        group_of: sample id -> its group, resampled as a whole; by default every sample is alone.
        keep: called with each condition and its predictions.

    Raises:
        ConfigError: a pattern that does not fit the data.
        DataError: a condition leaves no labelled sample.
    """
    key: dict[str, Any] = {"dataset": source.name, "split": split, "seed": seed}
    table: dict[str, Missing | None]
    if patterns is None:
        table = {**conditions(modalities, ratio=ratio, **key)}
        table |= {} if stored is None else {TABLE: stored}
    else:
        table = chosen_conditions(patterns, modalities=modalities, stored=stored, **key)
    rows = []
    everything = predict(list(table.values()), split)
    for condition, found in zip(table, everything, strict=True):
        if keep is not None:
            keep(condition, found)
        if not has_label(found.labels).any():
            raise DataError(
                f"split {split!r} of {source.name!r} has no labelled sample in the condition "
                f"{condition!r}; name another split to evaluate on."
            )
        task = {"problem_type": source.problem_type, "num_labels": num_labels, "task": source.task}
        groups = None if group_of is None else np.array([group_of[i] for i in found.ids])
        rows.append(_score(condition, found, prior, num_resamples, groups, task))
    return rows


def _score(
    condition: str,
    found: Predictions,
    prior: np.ndarray,
    num_resamples: int,
    groups: np.ndarray | None,
    task: Mapping[str, Any],
) -> ConditionScore:
    """The scores of one condition; `task` is what `eval.metrics.scores` has to know."""
    spread = None
    if num_resamples:
        first = headline(task["task"] or task["problem_type"])
        more: dict[str, Any] = {"metric": first, "num_resamples": num_resamples, "groups": groups}
        spread = interval(found.logits, found.labels, **more, **task)
    return ConditionScore(
        condition=condition,
        n=int(has_label(found.labels).sum()),
        metrics=scores(found.logits, found.labels, **task),
        chance=chance(found.labels, prior=prior, **task),
        interval=spread,
    )


def scores_document(
    models: Mapping[str, Sequence[ConditionScore]],
    *,
    expert_load: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Any]:
    """The content of a run's `scores.json`: several models under the same conditions.

    The first model is the run's own, the others are baselines. Conditions, chance and row counts
    are those of the first. The first metric is the headline.
    """
    first = next(iter(models.values()))
    return {
        "conditions": [row.condition for row in first],
        "metrics": list(first[0].metrics),
        "models": {name: {r.condition: r.metrics for r in rows} for name, rows in models.items()},
        "intervals": {
            name: {row.condition: list(row.interval) for row in rows if row.interval}
            for name, rows in models.items()
        },
        "chance": {row.condition: row.chance for row in first},
        "num_rows": {row.condition: row.n for row in first},
        "expert_load": {
            layer: [int(n) for n in load] for layer, load in (expert_load or {}).items()
        },
    }
