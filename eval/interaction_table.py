"""Every answer that experts, fuser and baselines allow, scored beside each other over seeds.

K experts, N samples, C classes, R resamples.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from eval.grid_table import Spread, interval_of
from eval.interaction_fit import LearnedGate, Stacking
from eval.interaction_fusion import (
    BASELINE,
    DEFAULT_TAU,
    LAST_RESORT,
    RULES,
    Experts,
    cascaded,
    category_prior,
    label_frequencies,
    softmax,
    subset_majority,
)
from eval.interaction_scores import by_category, headline_of, mcnemar, resampled_scores, scores
from mm_moe.errors import DataError

# Kinds of answers, in the order of the table.
MODEL, FUSED, FITTED, CONTROL, LEAKING = "model", "fused", "fitted", "control", "leaks"


@dataclass(frozen=True)
class Answer:
    """Probabilities (N, C) under a name; `kind` says where they come from."""

    name: str
    kind: str
    probs_NC: np.ndarray


def answers(
    test: Experts,
    *,
    validation: Experts | None = None,
    prior_KC: np.ndarray | None = None,
    tau: float = DEFAULT_TAU,
) -> tuple[list[Answer], list[str]]:
    """All answers to the test samples, and what could not be had and why.

    Args:
        test: the samples to answer.
        validation: samples that rules may be fitted on.
        prior_KC: label frequencies of each category's training samples.
        tau: of the cascade.
    """
    notes: list[str] = []
    found = [Answer(name, MODEL, softmax(logits)) for name, logits in test.baselines.items()]
    each = zip(test.names, test.probs_KNC, strict=True)
    found += [Answer(f"expert_{name}", MODEL, probs_NC) for name, probs_NC in each]
    found += _fused(test, tau, notes)
    found += _fitted(test, validation, notes)
    found += _controls(test, prior_KC, notes)
    return found, notes


def _fused(test: Experts, tau: float, notes: list[str]) -> list[Answer]:
    """The rules that nothing is fitted for, and that leak nothing."""
    left_out: dict[str, list[str]] = {"fuser": [], "baseline": []}
    found = []
    for name, rule in RULES.items():
        if rule.leaks or (name == "rus_reject" and not test.reject.any()):
            continue
        if name == "cascaded" and LAST_RESORT not in test.names:
            notes.append(f"cascaded: left out, there is no expert {LAST_RESORT!r}")
        elif rule.fuser and test.gate is None:
            left_out["fuser"].append(name)
        elif rule.baseline and BASELINE not in test.baselines:
            left_out["baseline"].append(name)
        else:
            apply = partial(cascaded, tau=tau) if name == "cascaded" else rule.apply
            found.append(Answer(name, FUSED, apply(test)))
    for lacking, names in left_out.items():
        if names:
            notes.append(f"{', '.join(names)}: left out, there are no logits of the {lacking}")
    return found


def _fitted(test: Experts, validation: Experts | None, notes: list[str]) -> list[Answer]:
    """The rules that are learnt from validation samples."""
    if validation is None:
        notes.append(
            "learned_gate, stacking: left out, there are no validation logits to fit them on"
        )
        return []
    found = []
    for name, kind in (("learned_gate", LearnedGate), ("stacking", Stacking)):
        try:
            found.append(Answer(name, FITTED, kind.fit(validation).apply(test)))
        except DataError as error:
            notes.append(f"{name}: left out, {error}")
    return found


def _controls(test: Experts, prior_KC: np.ndarray | None, notes: list[str]) -> list[Answer]:
    """What shows how much of a score is the categories' label frequencies, or the label itself."""
    found = []
    if prior_KC is None:
        notes.append(
            "category_prior: left out, the labels of the categories' training samples are not known"
        )
    elif test.gate is not None:
        prior = category_prior(test, prior_KC=prior_KC)
        found.append(Answer("category_prior", CONTROL, prior))
    if test.category is None:
        notes.append("oracle, subset_majority: left out, the test categories are not known")
        return found
    found += [Answer(n, LEAKING, rule.apply(test)) for n, rule in RULES.items() if rule.leaks]
    own_KC = label_frequencies(
        test.labels, test.category, num_experts=len(test.names), num_classes=test.num_classes
    )
    found.append(Answer("subset_majority", LEAKING, subset_majority(test, prior_KC=own_KC)))
    return found


def score_table(
    answered: Mapping[int, Sequence[Answer]],
    experts: Mapping[int, Experts],
    *,
    references: Sequence[str],
    num_resamples: int,
) -> list[dict[str, Any]]:
    """One row for each answer that all seeds have.

    Args:
        answered: seed -> its answers.
        experts: seed -> the samples that they answer; the same samples for every seed.
        references: answers that the others are compared with, where they are there.
        num_resamples: R of the paired bootstrap over samples (see `eval.grid_table.Comparison`).

    Returns:
        Rows {"name", "kind", "scores": metric -> {"mean", "std", "values"}, "by_category":
        category -> {"n", metric -> mean over seeds}, "against": reference -> {"difference", "low",
        "high", "p", "mcnemar": one for each seed}}.

    Raises:
        DataError: the seeds answer different samples.
    """
    first = next(iter(experts.values()))
    for seed, other in experts.items():
        if other.ids != first.ids:
            raise DataError(f"seed {seed} answers other samples than the first; score it again.")
    by_name = {seed: {one.name: one for one in found} for seed, found in answered.items()}
    names = [
        n for n in next(iter(by_name.values())) if all(n in found for found in by_name.values())
    ]
    values = {
        seed: resampled_scores(
            {name: found[name].probs_NC.argmax(-1) for name in names},
            first.labels,
            num_classes=first.num_classes,
            metric=headline_of(first.num_classes),
            num_resamples=num_resamples,
            groups=first.groups,
        )
        for seed, found in by_name.items()
    }
    rows = []
    for name in names:
        found = {seed: of[name] for seed, of in by_name.items()}
        row: dict[str, Any] = {"name": name, "kind": next(iter(found.values())).kind}
        row["scores"] = _over_seeds({s: scores(a.probs_NC, first.labels) for s, a in found.items()})
        row["by_category"] = _categories(found, experts)
        row["against"] = {
            reference: interval_of(
                np.mean([of[name] - of[reference] for of in values.values()], axis=0)
            )
            | {"mcnemar": _mcnemar(by_name, name, reference, first.labels)}
            for reference in references
            if reference in names and reference != name
        }
        rows.append(row)
    return rows


def _over_seeds(by_seed: Mapping[int, Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Metric -> mean, spread and values over the seeds."""
    found = {}
    for metric in next(iter(by_seed.values())):
        values = {seed: of[metric] for seed, of in by_seed.items()}
        spread = Spread.of(values)
        found[metric] = {"mean": spread.mean, "std": spread.std, "values": list(values.values())}
    return found


def _categories(
    found: Mapping[int, Answer], experts: Mapping[int, Experts]
) -> dict[str, dict[str, float]]:
    """Category -> its number of samples, and the mean of each metric over seeds."""
    each = [
        by_category(answer.probs_NC, of.labels, of.category, names=of.names)
        for answer, of in ((answer, experts[seed]) for seed, answer in found.items())
        if of.category is not None
    ]
    names = list(each[0]) if each else []
    return {
        name: {
            metric: statistics.fmean(one[name][metric] for one in each) for metric in each[0][name]
        }
        for name in names
        if all(name in one for one in each)
    }


def _mcnemar(
    by_name: Mapping[int, Mapping[str, Answer]], name: str, reference: str, labels: np.ndarray
) -> list[dict[str, float]]:
    """The test of each seed."""
    return [
        mcnemar(*(found[one].probs_NC.argmax(-1) == labels for one in (name, reference)))
        for found in by_name.values()
    ]
