"""Several data sets as one, drawn by weight."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import datasets
import numpy as np

from mm_moe.batch import Sample
from mm_moe.data.schema import NO_LABEL, DataSource
from mm_moe.data.streaming import SampleStream
from mm_moe.errors import ConfigError
from mm_moe.registry import DATASETS, nearest

PART, ROW = "__part__", "__row__"
SPECIFICATION = ("dataset", "data_dir", "weight", "options", "name", "split")
CHUNK = 4096  # choices that are drawn at once
COUNT = 1 << 20  # choices that are counted at once

# P parts, I positions


@dataclass(frozen=True)
class Part:
    """One data set of a mixture.

    Attributes:
        name: what the ids of its samples begin with.
        source: the data set.
        weight: how often it is drawn, relative to the others.
        split: its split for training.
    """

    name: str
    source: DataSource
    weight: float
    split: str


class MixtureData(DataSource):
    """Registered data sets, drawn with weights in training.

    Which part gives sample i of training is a keyed hash of (seed, i), and each part goes through
    its own epochs, in its own shuffled order: nothing depends on ranks or workers, and a resume
    counts the draws before it. An epoch of the mixture is as long as all parts together. Validation
    and test are those of one part. A modality that a part does not have is missing in its samples.

    Args:
        data_dir: where the parts are that name no `data_dir` of their own.
        parts: objects with `dataset` (a registered name), and, where wanted, `data_dir`, `weight`
            (1), `options`, `name` (that of the data set) and `split` (train).
        scored: name of the part whose validation and test splits are taken; by default the first
            that has any.
        name: key of masks; by default "mixture/" and the parts' names.

    Raises:
        ConfigError: no such data set, a weight that is not positive, parts of one name, or parts
            whose modalities differ in form.
        DataError: a part is not in order.
    """

    def __init__(
        self,
        data_dir: str | None = None,
        *,
        parts: Sequence[Mapping[str, Any]] = (),
        scored: str | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(data_dir)
        if not parts:
            raise ConfigError(
                'data set \'mixture\' needs parts: --dataset_options \'{"parts": [{"dataset": '
                '"emoji", "weight": 2}, {"dataset": "columns", "data_dir": "DIR"}]}\'.'
            )
        self.parts = tuple(_part(number, given, data_dir) for number, given in enumerate(parts))
        self.name = name or "mixture/" + "+".join(part.name for part in self.parts)
        names = [part.name for part in self.parts]
        for one in names:
            if names.count(one) > 1:
                raise ConfigError(
                    f"two parts of the mixture are called {one!r}; give each its own name."
                )
        sources = [part.source for part in self.parts]
        self.modalities = tuple(dict.fromkeys(m for source in sources for m in source.modalities))
        self.license = "; ".join(dict.fromkeys(source.license for source in sources))
        self._settle_labels(sources)
        self.sequences = self._forms("sequences")
        self.array_shapes = self._forms("array_shapes")
        self.private = any(source.private for source in sources)
        self.remote = next((s.remote for s in sources if s.remote is not None), None)
        self._scored = self._scored_part(scored)
        if self._scored is not None:
            self.unlabelled = dict(self._scored.source.unlabelled)

    def _settle_labels(self, sources: list[DataSource]) -> None:
        """Labels stay where all parts have the same."""
        first = sources[0]
        same = all(
            (one.problem_type, one.label_names, one.task)
            == (first.problem_type, first.label_names, first.task)
            for one in sources
        )
        self.problem_type = first.problem_type if same else NO_LABEL
        self.label_names = first.label_names if same else ()
        self.task = first.task if same else None

    def _forms(self, attribute: str) -> dict[str, Mapping[str, Any]]:
        """What the parts say of the form of their modalities, if they agree."""
        found: dict[str, Mapping[str, Any]] = {}
        for part in self.parts:
            own = getattr(part.source, attribute)
            for modality in part.source.modalities:
                form = own.get(modality, {})
                if found.setdefault(modality, form) != form:
                    raise ConfigError(
                        f"the parts of the mixture have {modality!r} in different forms "
                        f"({part.name!r}: {form or 'plain'}); mix data of one form."
                    )
        return {modality: form for modality, form in found.items() if form}

    def _scored_part(self, scored: str | None) -> Part | None:
        others = [p for p in self.parts if {"validation", "test"} & set(p.source.splits())]
        if scored is None:
            return next(iter(others), None)
        names = [part.name for part in self.parts]
        if scored not in names:
            raise ConfigError(f"the mixture has no part {scored!r}; {nearest(scored, names)}")
        return self.parts[names.index(scored)]

    def splits(self) -> tuple[str, ...]:
        """Train, and the other splits of the part that is scored."""
        if self._scored is None:
            return ("train",)
        own = self._scored.source.splits()
        return ("train", *(split for split in ("validation", "test") if split in own))

    def _in(self, split: str) -> list[tuple[int, Part, str]]:
        """(number, part, its split) of what a split is made of."""
        self.check_split(split)
        if split == "train":
            return [(number, part, part.split) for number, part in enumerate(self.parts)]
        assert self._scored is not None
        return [(self.parts.index(self._scored), self._scored, split)]

    def stream(self, split: str) -> datasets.IterableDataset:
        """Every row of the parts once, one part after the other."""
        places = [number for number, _, _ in self._in(split)]
        stream: datasets.IterableDataset = datasets.IterableDataset.from_generator(
            _all_rows, gen_kwargs={"source": self, "split": split, "places": places}
        )
        return stream

    def to_sample(self, row: dict[str, Any]) -> Sample:
        """The part's sample, its id with the part's name before it."""
        part = self.parts[row[PART]]
        return self._renamed(part.source.to_sample(row[ROW]), part)

    def _renamed(self, sample: Sample, part: Part) -> Sample:
        return replace(
            sample,
            id=f"{part.name}:{sample.id}",
            group=None if sample.group is None else f"{part.name}:{sample.group}",
            mask_key=f"{part.name}:{sample.mask_key}",
            label=None if self.problem_type == NO_LABEL else sample.label,
        )

    def index(self, split: str) -> Iterator[Sample]:
        """The parts' ids and labels."""
        for _, part, own in self._in(split):
            for sample in part.source.index(own):
                yield self._renamed(sample, part)

    def size(self, split: str) -> int | None:
        """Rows of all parts together; None where one does not know its own."""
        sizes = [part.source.size(own) for _, part, own in self._in(split)]
        known = [size for size in sizes if size is not None]
        return sum(known) if len(known) == len(sizes) else None

    def fingerprint(self) -> str:
        """sha256 over the parts' names, weights and own fingerprints."""
        facts = [[p.name, p.weight, p.split, p.source.fingerprint()] for p in self.parts]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def line(
        self, split: str, *, seed: int, shuffle_buffer: int, start: int
    ) -> Iterator[tuple[int, dict[str, Any]]] | None:
        """Training draws by weight; other splits have no order of their own."""
        return self._drawn(seed, shuffle_buffer, start) if split == "train" else None

    def _drawn(
        self, seed: int, shuffle_buffer: int, start: int
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        done_P = self.drawn_before(start, seed=seed)
        lines = [
            SampleStream(
                part.source,
                split=part.split,
                batch_size=1,
                seed=seed,
                shuffle_buffer=shuffle_buffer,
                start=int(done),
            ).rows()
            for part, done in zip(self.parts, done_P, strict=True)
        ]
        while True:
            for number in self.choices(start, CHUNK, seed=seed).tolist():
                epoch, row = next(lines[number])
                yield epoch, {PART: number, ROW: row}
            start += CHUNK

    def drawn_before(self, position: int, *, seed: int) -> np.ndarray:
        """How many of the positions before `position` each part has: int64 (P,)."""
        total_P = np.zeros(len(self.parts), dtype=np.int64)
        for begin in range(0, position, COUNT):
            chosen_I = self.choices(begin, min(COUNT, position - begin), seed=seed)
            total_P += np.bincount(chosen_I, minlength=len(self.parts))
        return total_P

    def choices(self, first: int, count: int, *, seed: int) -> np.ndarray:
        """The parts of positions `first` to `first + count`: int64 (I,)."""
        draw_I = uniform_at(first, count, key=f"{self.name}/{seed}")
        return np.searchsorted(self._edges, draw_I, side="right")

    @cached_property
    def _edges(self) -> np.ndarray:
        """Where one part's share of [0, 1) ends and the next begins: (P - 1,)."""
        weight_P = np.array([part.weight for part in self.parts])
        return (weight_P.cumsum() / weight_P.sum())[:-1]


def uniform_at(first: int, count: int, *, key: str) -> np.ndarray:
    """Numbers in [0, 1) that belong to positions `first` to `first + count`: float64 (I,).

    SplitMix64's finaliser (Steele et al. 2014) of a keyed counter: as quick as counting, so that a
    resume can count the draws of many steps.
    """
    digest = hashlib.blake2b(key.encode(), digest_size=8, person=b"mixture").digest()
    begin = (int.from_bytes(digest, "big") + first * 0x9E3779B97F4A7C15) % 2**64
    state_I = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(begin)
    state_I = (state_I ^ (state_I >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state_I = (state_I ^ (state_I >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    state_I ^= state_I >> np.uint64(31)
    return (state_I >> np.uint64(11)).astype(np.float64) / 2**53


def _part(number: int, given: Mapping[str, Any], data_dir: str | None) -> Part:
    """One part from its object."""
    if not isinstance(given, Mapping) or "dataset" not in given:
        raise ConfigError(f'part {number} of the mixture needs "dataset", a registered name.')
    for key in given:
        if key not in SPECIFICATION:
            hint = nearest(key, list(SPECIFICATION))
            raise ConfigError(f"part {number} of the mixture has no setting {key!r}; {hint}")
    weight, kind = given.get("weight", 1.0), given["dataset"]
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < 1e9:
        raise ConfigError(
            f"part {number} ({kind!r}) of the mixture has the weight {weight!r}; it must be a "
            "number over 0, or leave the part out."
        )
    try:
        source = DATASETS.resolve(kind)(given.get("data_dir", data_dir), **given.get("options", {}))
    except TypeError as error:
        raise ConfigError(f"options of part {number} ({kind!r}): {error}.") from error
    split = source.check_split(given.get("split", "train"))
    return Part(str(given.get("name", kind)), source, float(weight), split)


def _all_rows(source: MixtureData, split: str, places: list[int]) -> Iterator[dict[str, Any]]:
    """Rows of the parts at `places`, which `datasets` may shuffle."""
    parts = {number: (part, own) for number, part, own in source._in(split)}
    for number in places:
        part, own = parts[number]
        stream = SampleStream(part.source, split=own, batch_size=1, epochs=1)
        for _, row in stream.rows():
            yield {PART: number, ROW: row}
