"""Scores the published artefacts of interaction experts again, under every fusion rule.

Reads, below a folder, what `mm_moe.data.interactions.published` describes, in any of the places
`{set}_data/`, the folder itself, `*expert_inference_output*/expert_{model}/` and `expert_{model}/`.
What an expert folder has beside the schema:

- `{set}_{part}_logits_real.jsonl`: logits of a model that was trained, where the stored ones equal
  the baseline's. They give a section of their own.
- three logits for two classes: the last is a reject class, which is dropped.
- no fuser file: that of another expert folder of the same data set is taken where all agree, for
  one fuser serves all backbones; a note says so.

N samples, K experts, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from eval.interaction_fusion import (
    BASELINE,
    DEFAULT_TAU,
    Experts,
    joined,
    without_reject,
)
from eval.interaction_places import (
    NUM_CLASSES,
    OUTPUTS,
    Categories,
    Place,
    categories_of,
    places,
)
from eval.interaction_scores import headline_of
from eval.interaction_table import answers, score_table
from mm_moe.data.interactions.categories import NONE
from mm_moe.data.interactions.published import (
    CATEGORIES,
    PARTS,
    SETS,
    ExpertLogits,
    expert_name,
    read_expert_logits,
    read_fuser_logits,
)
from mm_moe.errors import DataError, MMMoEError


@dataclass
class Rescore:
    """What was scored.

    Attributes:
        sections: one for each expert folder, data set and variant (see `eval.interaction_report`).
        failures: title of an expert folder, or what of the categories could not be read -> why.
    """

    sections: list[dict[str, Any]] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)


def rescore(
    folder: Path,
    *,
    datasets: Sequence[str] = SETS,
    tau: float = DEFAULT_TAU,
    num_resamples: int = 1000,
) -> Rescore:
    """Score every expert folder; one that deviates does not keep the others from being scored.

    Args:
        folder: what holds the published files.
        datasets: of `SETS`.
        tau: of the cascade.
        num_resamples: of the paired bootstrap against the baseline.

    Raises:
        DataError: the folder is not there, or holds no expert folder of these data sets.
    """
    if not folder.is_dir():
        raise DataError(f"--rescore {str(folder)!r} is no folder; name that of the artefacts.")
    done = Rescore()
    for dataset in datasets:
        found = list(places(folder, dataset))
        if not found:
            continue
        known = categories_of(folder, dataset)
        done.failures |= known.failures
        for place in found:
            try:
                done.sections += list(_sections(place, found, known, tau, num_resamples))
            except MMMoEError as error:
                done.failures[place.title] = str(error)
    if not done.sections and not done.failures:
        raise DataError(
            f"{str(folder)!r} holds no logits of {', '.join(datasets)}: neither {OUTPUTS}/expert_*/"
            f"SET_PART_logits.jsonl, nor the same below SET_data or without {OUTPUTS}."
        )
    return done


def _sections(
    place: Place, others: Sequence[Place], known: Categories, tau: float, num_resamples: int
) -> Iterator[dict[str, Any]]:
    """The folder as it is stored, and once more with the logits that are called real."""
    stored = {part: _need(place, expert_name(place.dataset, part)) for part in PARTS}
    real = {
        part: path
        for part in PARTS
        if (path := place.folder / f"{place.dataset}_{part}_logits_real.jsonl").is_file()
    }
    expected = {path.name for path in (*stored.values(), *real.values())}
    expected.add(expert_name(place.dataset, "rus"))
    strange = sorted(
        path.name
        for path in place.folder.glob(f"{place.dataset}_*")
        if path.name not in expected and path.is_file()
    )
    notes = [*known.notes, *([f"not read: {', '.join(strange)}"] if strange else [])]
    fuser, where = _fuser(place, others)
    notes += [where] if where else []
    variants = {place.title: stored}
    if real:
        variants[f"{place.title}, real {', '.join(real)}"] = stored | real
    for title, paths in variants.items():
        experts, more = read_experts(paths, fuser, known)
        found, left_out = answers(experts, prior_KC=known.prior_KC, tau=tau)
        rows = score_table(
            {0: found}, {0: experts}, references=[BASELINE], num_resamples=num_resamples
        )
        yield {
            "title": f"{title} ({len(experts.ids)} samples)",
            "dataset": place.dataset,
            "folder": place.folder.name,
            "variant": "real" if paths is not stored else "stored",
            "metric": headline_of(NUM_CLASSES),
            "files": {part: path.name for part, path in paths.items()},
            "notes": [*notes, *more, *left_out],
            "rows": rows,
        }


def _need(place: Place, name: str) -> Path:
    path = place.folder / name
    if not path.is_file():
        there = sorted(p.name for p in place.folder.glob(f"{place.dataset}_*_logits*.jsonl"))
        raise DataError(f"{path} is not there; of {place.dataset!r} there are {', '.join(there)}.")
    return path


def _fuser(place: Place, others: Sequence[Place]) -> tuple[ExpertLogits | None, str]:
    """The fuser's logits and a note on where they come from; None without any."""
    name = expert_name(place.dataset, "rus")
    if (place.folder / name).is_file():
        found = read_fuser_logits(place.folder / name)
        return found, _repeats("rus", found)
    there = [other for other in others if (other.folder / name).is_file()]
    if not there:
        return None, ""
    found = read_fuser_logits(there[0].folder / name)
    content = _by_id(found)
    for other in there[1:]:
        theirs = _by_id(read_fuser_logits(other.folder / name))
        if {k: list(v) for k, v in theirs.items()} != {k: list(v) for k, v in content.items()}:
            return None, (
                f"no {name} here, and those of {there[0].folder.name} and {other.folder.name} "
                "differ: copy the right one here"
            )
    return found, f"no {name} here: that of {there[0].folder.name} is taken"


def read_experts(
    paths: Mapping[str, Path], fuser: ExpertLogits | None, known: Categories
) -> tuple[Experts, list[str]]:
    """The logits of one folder, joined by id; and notes on what is odd about them.

    Args:
        paths: part -> file, for all `PARTS`.
        fuser: its logits in the order of `CATEGORIES`, or None.
        known: the categories.

    Raises:
        DataError: a file deviates, or two files contradict each other about samples or labels.
    """
    files = {part: read_expert_logits(path) for part, path in paths.items()}
    order = files[CATEGORIES[0]].ids
    parts = {part: _by_id(found) for part, found in files.items()}
    if fuser is not None:
        parts["rus"] = _by_id(fuser)
    values = joined({_name(paths, part): by_id for part, by_id in parts.items()}, order=order)
    values = {part: values[_name(paths, part)] for part in parts}
    labels = _labels(paths, files, order)
    logits, reject = {}, {}
    for part in PARTS:
        logits[part], reject[part] = without_reject(values[part], num_classes=NUM_CLASSES)
    notes = [note for part, found in files.items() if (note := _repeats(part, found))]
    notes += _oddities(values)
    category = None
    if known.test is not None:
        category, more = _category(known.test, order)
        notes += more
    experts = Experts(
        ids=order,
        names=CATEGORIES,
        logits=np.stack([logits[part] for part in CATEGORIES]),
        labels=labels,
        reject=np.stack([reject[part] for part in CATEGORIES]),
        gate=values.get("rus"),
        category=category,
        baselines={BASELINE: logits[BASELINE]},
    )
    return experts, notes


def _name(paths: Mapping[str, Path], part: str) -> str:
    """What a message calls a part."""
    return str(paths[part]) if part in paths else "the fuser's file"


def _by_id(found: ExpertLogits) -> dict[str, np.ndarray]:
    return dict(zip(found.ids, found.logits_NL, strict=True))


def _labels(
    paths: Mapping[str, Path], files: Mapping[str, ExpertLogits], order: Sequence[str]
) -> np.ndarray:
    """The labels, which all files must agree on."""
    labels: dict[str, int] = {}
    for part, found in files.items():
        targets = [] if found.target_N is None else found.target_N.tolist()
        for one, target in zip(found.ids, targets, strict=True):
            if target >= NUM_CLASSES or labels.setdefault(one, target) != target:
                rule = f"but {labels.get(one)} in {paths[CATEGORIES[0]].name}"
                rule = rule if target < NUM_CLASSES else "which is no label of a test sample"
                raise DataError(f"{paths[part]}: id {one!r}: key 'target' is {target}, {rule}.")
    return np.array([labels[one] for one in order])


def _repeats(part: str, found: ExpertLogits) -> str:
    """A note on lines that repeat a sample; "" without any."""
    if not found.same_lines + found.close_lines:
        return ""
    return (
        f"{part}: {found.same_lines + found.close_lines} lines repeat a sample ("
        f"{found.same_lines} with equal logits, {found.close_lines} with almost equal ones); each "
        "sample counts once"
    )


def _oddities(values: Mapping[str, np.ndarray]) -> list[str]:
    """Notes on third logits, and on experts that are the baseline."""
    notes = []
    for part in PARTS:
        if values[part].shape[1] > NUM_CLASSES:
            other = int((values[part].argmax(-1) == NUM_CLASSES).sum())
            notes.append(
                f"{part}: 3 logits, the third of which is dropped; with it {other} of "
                f"{len(values[part])} answers would be neither class"
            )
        if part != BASELINE and np.array_equal(values[part], values[BASELINE]):
            notes.append(f"{part}: its logits equal the baseline's value for value")
    return notes


def _category(known: Mapping[str, int], order: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """Place in `CATEGORIES` of each sample, `NONE` where it has none."""
    category = np.array([known.get(one, NONE) for one in order])
    lacking = int((category == NONE).sum())
    if lacking == len(order):
        raise DataError(
            f"none of the {len(order)} samples has a category, first {order[0]!r}; the categories "
            f"have ids such as {next(iter(known), 'none')!r}."
        )
    return category, [f"{lacking} samples have no category"] if lacking else []
