"""The supports of a batch: what samples lack, packed from training rows that have it.

B samples of a batch, M modalities, Q samples that lack one modality, n supports of each, S distinct
support rows of one modality in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mm_moe.batch import Sample, pattern_index
from mm_moe.data.support import SupportIndex, group_code, support_numbers
from mm_moe.data.support_store import SupportStore
from mm_moe.errors import ConfigError

Processor = Callable[[list[Any]], dict[str, Tensor]]
Decode = Callable[[str, Any], Any]  # modality and raw value to the processor's, or None


@dataclass(frozen=True, kw_only=True)
class Supports:
    """Draws supports and packs them.

    Attributes:
        index: of the training rows.
        store: their payloads.
        dataset: name of the data set, which keys the draws.
        seed: another seed, other supports.
        num_supports: rows for each sample and modality that it lacks; None: as many as it has
            modalities (at least 1).
        whole: bring all that a support has, and not only the modality that it was drawn for.
        num_draws: times that scoring draws for a sample, to take the mean of what the model says.
    """

    index: SupportIndex
    store: SupportStore
    dataset: str
    seed: int = 0
    num_supports: int | None = None
    whole: bool = False
    num_draws: int = 1

    def __post_init__(self) -> None:
        if self.num_supports is not None and self.num_supports < 1:
            raise ConfigError(
                f"num_supports ({self.num_supports}) must be at least 1; leave it out for as many "
                "as a sample has modalities."
            )

    def draw(
        self, samples: Sequence[Sample], present_BM: Tensor, m: int, name: str
    ) -> list[list[int]]:
        """The support rows of each sample that lacks modality `m`, in the order of the batch."""
        own_B = pattern_index(present_BM).tolist()
        found = []
        for sample, own in zip(samples, own_B, strict=True):
            if own >> m & 1:
                continue
            stream = support_numbers(
                sample.id, modality=name, dataset=self.dataset, epoch=sample.epoch, seed=self.seed
            )
            count = self.num_supports or max(own.bit_count(), 1)
            group = group_code(sample.group_key)
            found.append(self.index.draw(own, m, count=count, stream=stream, group=group))
        return found

    def pack(
        self,
        samples: Sequence[Sample],
        present_BM: Tensor,
        *,
        modalities: Sequence[str],
        processors: Mapping[str, Processor],
        decode: Decode,
    ) -> dict[str, dict[str, Any]]:
        """The batch's `supports`: for each modality
        "inputs": the packed payload of S support rows, {} for none;
        "rows": int64 (Q, n), places among the S rows for each sample that lacks the modality, in
            the order of the batch; -1 is padding;
        "present": bool (S, M), what each support row has;
        "index": int64 (S,), its number in the training split.

        A row that was drawn for one modality is among those of every other that it has, if supports
        come whole. Where its image or text does not decode, it is left out.
        """
        width = self.num_supports or max(len(modalities) - 1, 1)
        draws = {name: self.draw(samples, present_BM, m, name) for m, name in enumerate(modalities)}
        wanted = {name: {row for rows in drawn for row in rows} for name, drawn in draws.items()}
        everyone = set().union(*wanted.values())
        packed = {}
        for m, name in enumerate(modalities):
            brought = {row for row in everyone if self.whole and self._has(row, m)}
            asked = sorted(wanted[name] | brought)
            values = [decode(name, value) for value in self.store.values(name, asked)]
            kept = [(row, v) for row, v in zip(asked, values, strict=True) if v is not None]
            rows = [row for row, _ in kept]
            place_of = {row: s for s, row in enumerate(rows)}
            packed[name] = {
                "inputs": processors[name]([value for _, value in kept]) if kept else {},
                "rows": _places(draws[name], place_of, width=width),
                "present": self._present(rows),
                "index": torch.tensor(rows, dtype=torch.int64),
            }
        return packed

    def _has(self, row: int, m: int) -> bool:
        return bool(self.index.pattern_N[row] >> m & 1)

    def _present(self, rows: list[int]) -> Tensor:
        """Bool (S, M)."""
        pattern_S = torch.from_numpy(self.index.pattern_N[rows].astype("int64"))
        return (pattern_S[:, None] >> torch.arange(self.index.num_modalities) & 1).bool()


def _places(drawn: list[list[int]], place_of: Mapping[int, int], *, width: int) -> Tensor:
    """Int64 (Q, width): places of the drawn rows, then -1."""
    places = torch.full((len(drawn), width), -1, dtype=torch.int64)
    for q, rows in enumerate(drawn):
        kept = [place_of[row] for row in rows if row in place_of]
        places[q, : len(kept)] = torch.tensor(kept, dtype=torch.int64)
    return places
