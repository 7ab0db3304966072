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
        kind: "none", "both" (any one modality) or the name of the modality that is taken.
        ratio: share of samples that lack something.
        both_ratio: for kind "both" and two modalities: share of those samples that lack the
            alphabetically first one (the image of image and text); with more modalities the missing
            one is drawn uniformly.
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
        kinds = ["none", "both", *modalities]
        if self.kind not in kinds:
            raise ConfigError(f"unknown missing kind {self.kind!r}; {nearest(self.kind, kinds)}")
        if self.kind != "none" and self.ratio > 0 and len(modalities) < 2:
            raise ConfigError(
                f"missing kind {self.kind!r} needs at least two modalities, and "
                f"{self.dataset!r} has {len(modalities)} ({', '.join(modalities)}); "
                "take missing kind none."
            )

    def present(self, ids: Sequence[str], modalities: Sequence[str]) -> Tensor:
        """What the protocol leaves of complete samples: bool (B, M), at most one False a row.

        Raises:
            ConfigError: the kind does not fit the modalities.
        """
        self.check_kind(modalities)
        present_BM = torch.ones(len(ids), len(modalities), dtype=torch.bool)
        if self.kind == "none" or self.ratio == 0:
            return present_BM
        for row, sample_id in enumerate(ids):
            lost = self._lost(sample_id, modalities)
            if lost is not None:
                present_BM[row, modalities.index(lost)] = False
        return present_BM

    def _lost(self, sample_id: str, modalities: Sequence[str]) -> str | None:
        """The modality taken from one sample, or None."""
        whether, which = draws(
            sample_id, purpose="missing", dataset=self.dataset, split=self.split, seed=self.seed
        )
        if whether >= self.ratio:
            return None
        if self.kind != "both":
            return self.kind
        # Sorted, so that the model's order of modalities does not change the table.
        names = sorted(modalities)
        if len(names) == 2:
            return names[0] if which < self.both_ratio else names[1]
        return names[int(which * len(names))]

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
        if self.kind != "both":
            return {name: total * (name == self.kind) for name in names}
        if len(names) == 2:
            first = total * self.both_ratio
            return {names[0]: first, names[1]: total - first}
        return dict.fromkeys(names, total / len(names))

    def table_hash(self, ids: Sequence[str], modalities: Sequence[str]) -> str:
        """sha256 of the table over these ids, whatever their order."""
        return hash_table(ids, pattern_index(self.present(ids, modalities)), modalities)


def hash_table(ids: Sequence[str], patterns: Tensor, modalities: Sequence[str]) -> str:
    """sha256 of (id, pattern) pairs in the order of the ids' names."""
    rows = sorted(zip(ids, patterns.tolist(), strict=True))
    return hashlib.sha256(json.dumps([list(modalities), rows]).encode()).hexdigest()
