"""Missing tables as files: kept with ids and a hash, and the old `.pt` tables brought in.

A table is a fixed answer for given ids, where `MissingProtocol` answers for any id. Both have
`present` and `describe`, so a collator takes either.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm_moe.batch import IMAGE, TEXT, pattern_index
from mm_moe.data.missing import MissingProtocol, hash_table
from mm_moe.errors import DataError

# B samples of a batch, M modalities

FORMAT = "mm_moe.missing_table.v1"
# The codes of the old tables, as patterns over (image, text): bit 0 image, bit 1 text present.
LEGACY_PATTERNS = {0: 3, 1: 1, 2: 2}  # 0 complete, 1 text missing, 2 image missing


@dataclass(frozen=True)
class MissingTable:
    """A stored table.

    Attributes:
        ids: sample ids.
        patterns: for each id the index of its set of present modalities (`mm_moe.batch`).
        modalities: order of the bits of a pattern.
        origin: where the table comes from (the protocol's fields, or a file).
    """

    ids: tuple[str, ...]
    patterns: tuple[int, ...]
    modalities: tuple[str, ...]
    origin: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.patterns):
            raise DataError(
                f"a missing table has {len(self.ids)} ids and {len(self.patterns)} patterns."
            )
        if len(set(self.ids)) != len(self.ids):
            raise DataError("a missing table names a sample twice; ids must be unique.")
        complete = 2 ** len(self.modalities) - 1
        if any(not 0 < pattern <= complete for pattern in self.patterns):
            raise DataError(f"a missing table has a pattern outside 1 to {complete}.")

    @cached_property
    def _pattern_of(self) -> dict[str, int]:
        return dict(zip(self.ids, self.patterns, strict=True))

    def present(self, ids: Sequence[str], modalities: Sequence[str]) -> Tensor:
        """Bool (B, M) for these ids.

        Raises:
            DataError: an id or a modality is not in the table.
        """
        if set(modalities) != set(self.modalities):
            raise DataError(
                f"the missing table is over {', '.join(self.modalities)}, "
                f"the model over {', '.join(modalities)}."
            )
        unknown = [sample_id for sample_id in ids if sample_id not in self._pattern_of]
        if unknown:
            raise DataError(
                f"{len(unknown)} samples are not in the missing table, first {unknown[0]!r}; "
                "was it made for another split?"
            )
        bits = [self.modalities.index(name) for name in modalities]
        rows = [[bool(self._pattern_of[i] >> bit & 1) for bit in bits] for i in ids]
        return torch.tensor(rows, dtype=torch.bool).reshape(len(ids), len(modalities))

    def check(self, ids: Sequence[str], modalities: Sequence[str], *, what: str) -> None:
        """Check that the table is over exactly these ids and modalities.

        Args:
            ids: what the masks of the data are keyed by.
            modalities: of the data.
            what: whose ids they are, for the message.

        Raises:
            DataError: it lacks an id, has one too many, or is over other modalities.
        """
        self.present(ids, modalities)
        extra = sorted(set(self.ids) - set(ids))
        if extra:
            raise DataError(
                f"the missing table has {len(self.ids)} samples, {what} has {len(ids)}; "
                f"{len(extra)} of the table are not there, first {extra[0]!r}. Was it made for "
                "another split?"
            )

    def describe(self, modalities: Sequence[str] | None = None) -> str:
        """The table in the words of `MissingProtocol.describe`, counted instead of expected."""
        names = tuple(modalities or self.modalities)
        absent_BM = ~self.present(self.ids, names)
        total = 100 * absent_BM.any(-1).float().mean().item()
        parts = ", ".join(
            f"{100 * absent_BM[:, m].float().mean().item():.3g}% no {names[m]}"
            for m in reversed(range(len(names)))
        )
        return f"{total:.3g}% = {total:.3g}% of samples lack something: {parts}"

    def table_hash(self) -> str:
        """sha256 of the table, whatever the order of its rows."""
        return hash_table(self.ids, torch.tensor(self.patterns), self.modalities)

    def save(self, path: str | Path) -> None:
        """Write the table as JSON, with its hash."""
        record = {
            "format": FORMAT,
            "sha256": self.table_hash(),
            "origin": self.origin,
            "modalities": self.modalities,
            "ids": self.ids,
            "patterns": self.patterns,
        }
        Path(path).write_text(json.dumps(record, indent=1), encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> MissingTable:
        """Read a table that `save` wrote.

        Raises:
            DataError: not such a table, or its content does not match its hash.
        """
        try:
            record = json.loads(Path(path).read_text(encoding="utf-8"))
            if record["format"] != FORMAT:
                raise KeyError("format")
            if not isinstance(record["origin"], dict):
                raise TypeError("its origin is no object")
            if not all(type(pattern) is int for pattern in record["patterns"]):
                raise TypeError("its patterns are no whole numbers")
            table = cls(
                ids=tuple(record["ids"]),
                patterns=tuple(record["patterns"]),
                modalities=tuple(record["modalities"]),
                origin=record["origin"],
            )
            expected = record["sha256"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{path} is not a missing table ({FORMAT}): {error}.") from error
        if table.table_hash() != expected:
            raise DataError(f"the missing table {path} was changed: its hash does not match.")
        return table


def table_of(
    protocol: MissingProtocol, *, ids: Sequence[str], modalities: Sequence[str]
) -> MissingTable:
    """Write down what a protocol says about these ids."""
    patterns = pattern_index(protocol.present(ids, modalities))
    origin = dict(vars(protocol))
    return MissingTable(tuple(ids), tuple(patterns.tolist()), tuple(modalities), origin)


def import_legacy_table(path: str | Path, *, ids: Sequence[str]) -> MissingTable:
    """Bring in a `<name>_missing_<kind>_<ratio>.pt` table of MAP, DCP or REP.

    It is a float vector over the rows of the old arrow file: 0 complete, 1 text missing, 2 image
    missing. It holds no ids, so they must come in that same order. Read with `weights_only`: a
    table that would run code is refused.

    Raises:
        DataError: unreadable, another number of rows, or other codes.
    """
    try:
        codes = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises nearly anything
        # only the kind: the library's own text tells how to run what a strange pickle asks for
        raise DataError(
            f"{path} is not a missing table of numbers ({type(error).__name__}); take the file of "
            "the release, or a table of ours."
        ) from error
    whole = isinstance(codes, Tensor) and codes.layout == torch.strided
    if not whole or codes.dim() != 1 or codes.is_complex():
        raise DataError(f"{path} does not hold one vector of codes.")
    if len(codes) != len(ids):
        raise DataError(
            f"{path} has {len(codes)} rows and the split {len(ids)} samples; "
            "take the split (and its order) that the table was made for."
        )
    values = codes.tolist()
    strange = sorted({value for value in values if value not in LEGACY_PATTERNS})
    if strange:
        raise DataError(f"{path} has codes {strange[:5]}; known are 0, 1 (no text), 2 (no image).")
    patterns = tuple(LEGACY_PATTERNS[int(value)] for value in values)
    return MissingTable(tuple(ids), patterns, (IMAGE, TEXT), {"legacy": Path(path).name})
