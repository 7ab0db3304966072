"""One sample under several missing protocols: each different remainder of it once.

What a model says of a sample depends on what is left of it, not on the name of the test condition.
Ten conditions on two modalities leave at most three different remainders (both, one, the other), so
a model that looks at each of these once has seen all ten.

B samples, M modalities.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from mm_moe.batch import Batch, Sample, pattern_index
from mm_moe.data.collate import Collator, Missing, presence

CHUNK = 64  # samples whose masks are asked for at once


@dataclass(frozen=True)
class View:
    """What is left of a sample under some protocols.

    Attributes:
        sample: the sample without the payloads that these protocols take.
        used_by: positions of these protocols.
    """

    sample: Sample
    used_by: tuple[int, ...]

    @property
    def key(self) -> str:
        """The view's id in a batch; `read_key` takes it apart."""
        return f"{','.join(map(str, self.used_by))}:{self.sample.id}"


def read_key(key: str) -> tuple[str, tuple[int, ...]]:
    """Sample id and positions of the protocols, from a view's key."""
    used_by, _, sample_id = key.partition(":")
    return sample_id, tuple(map(int, used_by.split(",")))


def views(
    samples: Sequence[Sample],
    *,
    protocols: Sequence[Missing | None],
    modalities: Sequence[str],
) -> list[View]:
    """The different remainders of each sample; every protocol is used by exactly one of them.

    Masks and the rule that a protocol never takes the last modality are the collator's. Presence
    is that before decoding, as there: a sample whose image does not decode keeps its views.

    Args:
        samples: B samples.
        protocols: imposed missingness; None leaves a sample as it is.
        modalities: the model's modalities.
    """
    left = [presence(samples, modalities=modalities, missing=one) for one in protocols]
    patterns = [pattern_index(left_BM).tolist() for left_BM in left]
    found = []
    for row, sample in enumerate(samples):
        users: dict[int, list[int]] = {}
        for position, pattern_B in enumerate(patterns):
            users.setdefault(pattern_B[row], []).append(position)
        for used_by in users.values():
            kept_M = left[used_by[0]][row].tolist()
            payload = {
                name: sample.payload[name]
                for name, kept in zip(modalities, kept_M, strict=True)
                if kept
            }
            found.append(View(dataclasses.replace(sample, payload=payload), tuple(used_by)))
    return found


class ViewStream(torch.utils.data.IterableDataset):
    """The views of a stream of samples, those of one sample next to each other.

    Args:
        samples: a finite stream.
        protocols: as in `views`.
        modalities: as in `views`.
        draws: times that a view which lacks something comes: each draws other supports.
    """

    def __init__(
        self,
        samples: Iterable[Sample],
        *,
        protocols: Sequence[Missing | None],
        modalities: Sequence[str],
        draws: int = 1,
    ) -> None:
        self.samples, self.protocols, self.modalities = samples, protocols, modalities
        self.draws = draws

    def __iter__(self) -> Iterator[View]:
        samples = iter(self.samples)
        while chunk := list(itertools.islice(samples, CHUNK)):
            for view in views(chunk, protocols=self.protocols, modalities=self.modalities):
                yield from self._drawn(view)

    def _drawn(self, view: View) -> Iterator[View]:
        """A view that lacks something once for each draw, which are told apart as epochs are."""
        whole = len(view.sample.payload) == len(self.modalities)
        for draw in range(1 if whole else self.draws):
            epoch = view.sample.epoch + draw
            yield dataclasses.replace(view, sample=dataclasses.replace(view.sample, epoch=epoch))


@dataclass(frozen=True)
class ViewCollator:
    """Packs views as samples that lack nothing more; the batch's ids are the views' keys.

    Attributes:
        collator: without a protocol of its own.
    """

    collator: Collator

    def __call__(self, found: list[View]) -> Batch:
        """Pack views.

        Raises:
            DataError: as `Collator`.
        """
        batch = self.collator([view.sample for view in found])
        batch["ids"] = [view.key for view in found]
        return batch
