"""Events and notes of many stays in files, so that memory holds one bucket of stays at a time.

Hospital tables are ordered by event or by patient and may have hundreds of millions of lines; rows
are wanted stay by stay. One pass appends every event to the file of its bucket; a bucket is read
when its first stay is asked for. The files hold patients' data: they lie in a folder of their owner
and go with the store.

E events of a chunk, S stays, V variables.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import weakref
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from mm_moe.data.events import pack_events

BUCKET_STAYS = 2000
EVENT = np.dtype([("stay", "<i4"), ("item", "<i4"), ("hours", "<f4"), ("value", "<f4")])


class _Buckets:
    """A folder with one file for every `BUCKET_STAYS` stays."""

    def __init__(self, ending: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="stays-"))  # for its owner only
        self.ending = ending
        self._clean = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self.loaded = -1

    def path(self, bucket: int) -> Path:
        return self.folder / f"{bucket:06d}.{self.ending}"


class EventStore:
    """Events of S stays, of which some count for the vocabulary.

    Args:
        train_S: bool, the stays that decide which variables there are.

    Attributes:
        variables: names by place, after `settle`.
        left_out: items that too few training stays have, after `settle`.
    """

    def __init__(self, train_S: np.ndarray) -> None:
        self.train_S = train_S
        self.variables: tuple[str, ...] = ()
        self.left_out = 0
        self._buckets = _Buckets("events")
        self._code_of: dict[str, int] = {}
        self._seen: list[np.ndarray] = []  # item -> bits of the training stays that have it
        self._place_of = np.zeros(0, np.int64)
        self._events = np.zeros(0, EVENT)

    def add(
        self, stays_E: np.ndarray, items_E: np.ndarray, hours_E: np.ndarray, values_E: np.ndarray
    ) -> None:
        """Append events; items are texts."""
        if not len(stays_E):
            return
        names, codes_E = np.unique(items_E.astype(str), return_inverse=True)
        known = np.array([self._code(name) for name in names])
        events = np.empty(len(stays_E), EVENT)
        events["stay"], events["item"] = stays_E, known[codes_E]
        events["hours"], events["value"] = hours_E, values_E
        counted = events[self.train_S[stays_E]]
        for code in np.unique(counted["item"]):
            stays = counted["stay"][counted["item"] == code]
            np.bitwise_or.at(self._seen[code], stays >> 3, (1 << (stays & 7)).astype(np.uint8))
        bucket_E = events["stay"] // BUCKET_STAYS
        for bucket in np.unique(bucket_E):
            with self._buckets.path(bucket).open("ab") as file:
                file.write(events[bucket_E == bucket].tobytes())

    def _code(self, name: str) -> int:
        if name not in self._code_of:
            self._code_of[name] = len(self._code_of)
            self._seen.append(np.zeros((len(self.train_S) + 7) // 8, np.uint8))
        return self._code_of[name]

    def settle(self, *, min_stays: int, max_variables: int) -> None:
        """Keep the variables that most training stays have; ties by name.

        Args:
            min_stays: a variable of fewer training stays is left out: its mean would tell of them.
            max_variables: no more than these.
        """
        counts = {name: int(np.bitwise_count(self._seen[c]).sum()) for name, c in self._items()}
        enough = [name for name, count in counts.items() if count >= min_stays]
        kept = sorted(enough, key=lambda name: (-counts[name], name))[:max_variables]
        self.variables = tuple(sorted(kept))
        self.left_out = len(counts) - len(kept)
        self._place_of = np.full(len(counts), -1)
        for place, name in enumerate(self.variables):
            self._place_of[self._code_of[name]] = place
        self._seen = []

    def _items(self) -> Iterable[tuple[str, int]]:
        return self._code_of.items()

    def get(self, stay: int) -> np.ndarray | None:
        """The events of a stay, float32 (T, 3); None where it has none."""
        bucket = stay // BUCKET_STAYS
        if bucket != self._buckets.loaded:
            path = self._buckets.path(bucket)
            events = np.fromfile(path, EVENT) if path.exists() else np.zeros(0, EVENT)
            events = events[self._place_of[events["item"]] >= 0]
            self._events = events[np.argsort(events["stay"], kind="stable")]
            self._buckets.loaded = bucket
        first, end = np.searchsorted(self._events["stay"], [stay, stay + 1])
        if first == end:
            return None
        own = self._events[first:end]
        return pack_events(own["hours"], self._place_of[own["item"]], own["value"])


class NoteStore:
    """Texts of stays, each with its hour."""

    def __init__(self) -> None:
        self._buckets = _Buckets("notes")
        self._notes: dict[int, list[tuple[float, str]]] = {}

    def add(self, stays: Iterable[int], hours: Iterable[float], texts: Iterable[str]) -> None:
        """Append notes."""
        lines: dict[int, list[str]] = {}
        for stay, hour, text in zip(stays, hours, texts, strict=True):
            line = json.dumps([int(stay), float(hour), str(text)])
            lines.setdefault(int(stay) // BUCKET_STAYS, []).append(line + "\n")
        for bucket, own in lines.items():
            with self._buckets.path(bucket).open("a", encoding="utf-8") as file:
                file.writelines(own)

    def get(self, stay: int, *, max_chars: int) -> str | None:
        """The notes of a stay in their order, of which the last characters; None without notes."""
        bucket = stay // BUCKET_STAYS
        if bucket != self._buckets.loaded:
            self._notes = {}
            path = self._buckets.path(bucket)
            if path.exists():
                with path.open(encoding="utf-8") as file:
                    for line in file:
                        own, hour, text = json.loads(line)
                        self._notes.setdefault(own, []).append((hour, text))
            self._buckets.loaded = bucket
        found = sorted(self._notes.get(stay, []))
        return "\n\n".join(text for _, text in found)[-max_chars:] or None
