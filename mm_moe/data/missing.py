"""Which modalities a sample lacks: the missing-modality protocol, decided by keyed hash.

The words, once: a missing ratio of 70% means that 70% of the *samples* lack *something*. Of kind
"text" they all lack the text; of kind "both" half of them (`both_ratio`) lack the image and the
other half the text, so 65% have an image and 65% a text ("65/65" in published tables).

The protocol is that of MAP (Lee et al., 2023) and its successors. There a table is drawn by a
random generator over row numbers, so it moves with the order of draws; here each sample's fate is a
hash of (data set, split, id, seed): order, ranks and resumes do not matter, and the samples that
lack something at 50% still lack the same thing at 70%.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mm_moe.batch import pattern_index
from mm_moe.data.chance import draws
from mm_moe.errors import ConfigError
from mm_moe.registry import nearest

# B samples of a batch, M modalities


@dataclass(frozen=True, kw_only=True)
class MissingProtocol:
    """Imposed missingness of one split of one data set.

    Attributes:
        dataset: the source's name.
        split: the source's split; train and test are drawn independently.
        kind: what a sample that lacks something lacks:
            "none": nothing;
            a modality, or several joined by + ("audio+vision"): these;
            "any": any one modality, drawn uniformly;
            "both": the same for two modalities, whose shares `both_ratio` sets;
            "subset": any set of modalities short of all, drawn uniformly (MPLMM's modes 0 to 5).
        ratio: share of samples that lack something.
        both_ratio: for kind "both": share of those samples that lack the alphabetically first
            modality (the image of image and text).
        seed: another seed, another table.
    """

    dataset: str
    split: str
    kind: str = "none"
    ratio: float = 0.0
    both_ratio: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("ratio", "both_ratio"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ConfigError(f"missing {name} is {value}; it is a share between 0 and 1.")

    def check_kind(self, modalities: Sequence[str]) -> None:
        """Check that the kind fits the modalities.

        Raises:
            ConfigError: unknown kind, or a lone modality that would be taken.
        """
        if self.kind == "both" and len(modalities) > 2:
            raise ConfigError(
                f"missing kind 'both' is for two modalities, and {self.dataset!r} has "
                f"{len(modalities)}; take any (one of them is missing) or subset."
            )
        if self.kind != "none" and not _sets_of(self.kind, modalities):
            kinds = kinds_for(modalities)
            raise ConfigError(f"unknown missing kind {self.kind!r}; {nearest(self.kind, kinds)}")
        if self.kind != "none" and self.ratio > 0 and len(modalities) < 2:
            raise ConfigError(
                f"missing kind {self.kind!r} needs at least two modalities, and "
                f"{self.dataset!r} has {len(modalities)} ({', '.join(modalities)}); "
                "take missing kind none."
            )

    def present(self, ids: Sequence[str], modalities: Sequence[str]) -> Tensor:
        """What the protocol leaves of complete samples: bool (B, M), never a row of False alone.

        Raises:
            ConfigError: the kind does not fit the modalities.
        """
        self.check_kind(modalities)
        present_BM = torch.ones(len(ids), len(modalities), dtype=torch.bool)
        if self.kind == "none" or self.ratio == 0:
            return present_BM
        for row, sample_id in enumerate(ids):
            for name in self._lost(sample_id, modalities):
                present_BM[row, modalities.index(name)] = False
        return present_BM

    def _lost(self, sample_id: str, modalities: Sequence[str]) -> tuple[str, ...]:
        """The modalities taken from one sample."""
        whether, which = draws(
            sample_id, purpose="missing", dataset=self.dataset, split=self.split, seed=self.seed
        )
        if whether >= self.ratio:
            return ()
        sets = _sets_of(self.kind, modalities)
        if self.kind == "both":
            return sets[0] if which < self.both_ratio else sets[1]
        return sets[int(which * len(sets))]

    def describe(self, modalities: Sequence[str] = ("image", "text")) -> str:
        """In words: "70% = 70% of samples lack something: 35% no text, 35% no image"."""
        self.check_kind(modalities)
        if self.kind == "none" or self.ratio == 0:
            return "0% = every sample keeps all that it has"
        shares = self._shares(modalities)
        parts = ", ".join(f"{share:.3g}% no {name}" for name, share in reversed(shares.items()))
        percent = f"{100 * self.ratio:.3g}%"
        return f"{percent} = {percent} of samples lack something: {parts}"

    def _shares(self, modalities: Sequence[str]) -> dict[str, float]:
        """Expected percentage of samples that lack each modality, in sorted order."""
        names, total = sorted(modalities), 100 * self.ratio
        if self.kind == "both":
            first = total * self.both_ratio
            return {names[0]: first, names[1]: total - first}
        sets = _sets_of(self.kind, modalities)
        return {name: total * sum(name in lost for lost in sets) / len(sets) for name in names}

    def table_hash(self, ids: Sequence[str], modalities: Sequence[str]) -> str:
        """sha256 of the table over these ids, whatever their order."""
        return hash_table(ids, pattern_index(self.present(ids, modalities)), modalities)


def kinds_for(modalities: Sequence[str]) -> list[str]:
    """The missing kinds that fit some modalities, without those of several joined ones."""
    mixed = ["both"] if len(modalities) == 2 else []
    return ["none", *mixed, *modalities, "any", "subset"]


def _sets_of(kind: str, modalities: Sequence[str]) -> list[tuple[str, ...]]:
    """The sets of modalities that a kind may take, in an order that depends on names only.

    Sorted, so that the model's order of modalities does not change the table. Empty if the kind
    does not fit.
    """
    names = sorted(modalities)
    if kind in ("any", "both"):
        return [(name,) for name in names]
    if kind == "subset":
        sizes = range(1, max(len(names), 2))
        return [lost for size in sizes for lost in itertools.combinations(names, size)]
    lost = tuple(kind.split("+"))
    known = set(lost) <= set(names) and len(set(lost)) == len(lost)
    return [lost] if known and (len(lost) < len(names) or len(names) == 1) else []


def hash_table(ids: Sequence[str], patterns: Tensor, modalities: Sequence[str]) -> str:
    """sha256 of (id, pattern) pairs in the order of the ids' names."""
    rows = sorted(zip(ids, patterns.tolist(), strict=True))
    return hashlib.sha256(json.dumps([list(modalities), rows]).encode()).hexdigest()
