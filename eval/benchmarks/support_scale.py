"""Supports from a million patients: seconds, memory, and the cost of a draw and of a step.

    python -m eval.benchmarks.support_scale --quick    # to 100,000 patients, within a minute
    python -m eval.benchmarks.support_scale            # to 1,000,000; stored

Made patients have each of six modalities (32 bytes each) with a chance of 70%. For each number of
them the split is streamed once: that writes the Arrow file and the index. Then the same samples
draw supports, and the same batches are collated with and without them. The peer draws as
MoE-Retriever's release does: it joins the row lists of all fitting combinations for every draw and
takes `random.sample` of them. Times are CPU seconds of one thread, in turn over all sizes, medians;
memory is what the process holds more after the index was built, and the size of its arrays.

Figures are ratios: the largest number of patients / the smallest (1 is flat), and ours / the
peer's. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import torch

from eval.benchmarks.moe_layer import RESULTS, describe_machine
from mm_moe.batch import PackedArray, Sample
from mm_moe.data.collate import Collator
from mm_moe.data.schema import NO_LABEL, DataSource
from mm_moe.data.support import SupportIndex, group_code, support_numbers
from mm_moe.data.support_batch import Supports
from mm_moe.data.support_store import write_store

MODALITIES = tuple(f"m{m}" for m in range(6))
WIDTH = 8  # float32 values of one payload
SHARE = 0.7  # of the patients have a modality
BATCH = 64
NUM_SUPPORTS = 4
SHOWN = "{:>9,} {:>8.1f} {:>10.1f} {:>9.1f} {:>9.0f} {:>11,.0f} {:>10.1f} {:>9.2f} {:>9.2f}"


class MadePatients(DataSource):
    """Patients whose patterns are drawn once; their payloads are their own number."""

    name, modalities, problem_type, license = "made_patients", MODALITIES, NO_LABEL, "ours"
    label_names = ()

    def __init__(self, count: int) -> None:
        super().__init__(None)
        self.has_NM = np.random.default_rng(0).random((count, len(MODALITIES))) < SHARE
        self.has_NM[~self.has_NM.any(1), 0] = True

    def splits(self) -> tuple[str, ...]:
        """One."""
        return ("train",)

    def stream(self, split: str) -> datasets.IterableDataset:
        """Numbers of patients."""
        return datasets.IterableDataset.from_generator(partial(_numbers, len(self.has_NM)))

    def to_sample(self, row: dict[str, Any]) -> Sample:
        """The modalities of one patient."""
        number = row["patient"]
        content = np.full(WIDTH, number, np.float32).tobytes()
        array = PackedArray(content, "float32", (WIDTH,))
        has_M = self.has_NM[number].tolist()
        return Sample(
            str(number), {n: array for n, has in zip(MODALITIES, has_M, strict=True) if has}
        )

    def size(self, split: str) -> int:
        """Patients."""
        return len(self.has_NM)

    def fingerprint(self) -> str:
        """Their number says it all."""
        return str(len(self.has_NM))


class ReleaseDraws:
    """Rows by combination in lists, joined anew for each draw."""

    def __init__(self, index: SupportIndex) -> None:
        self.rows: dict[int, list[int]] = {}
        for row, pattern in enumerate(index.pattern_N.tolist()):
            self.rows.setdefault(pattern, []).append(row)

    def draw(self, own: int, modality: int, count: int) -> list[int]:
        """A list of all that fit, then a sample of it."""
        needed = own | 1 << modality
        pool = [row for p, rows in self.rows.items() if p & needed == needed for row in rows]
        return random.sample(pool, min(count, len(pool)))


def _numbers(count: int) -> Iterator[dict[str, int]]:
    for number in range(count):
        yield {"patient": number}


def stacked(rows: list[Any]) -> dict[str, torch.Tensor]:
    """The processor of every modality."""
    return {"values": torch.from_numpy(np.stack([row.array() for row in rows]))}


def seconds(work: Callable[[], object]) -> float:
    """CPU seconds of this thread."""
    start = time.thread_time()
    work()
    return time.thread_time() - start


class Measured:
    """One number of patients."""

    def __init__(self, count: int, folder: Path) -> None:
        self.source = MadePatients(count)
        process = psutil.Process()
        before, start = process.memory_info().rss, time.perf_counter()
        self.index, store = write_store(self.source, split="train", missing=None, folder=folder)
        self.stream_s = time.perf_counter() - start
        self.grown = process.memory_info().rss - before
        build = partial(SupportIndex, self.index.pattern_N, self.index.group_N, num_modalities=6)
        self.index_s = seconds(build)
        self.file_bytes = sum(path.stat().st_size for path in folder.iterdir())
        supports = Supports(index=self.index, store=store, dataset="d", num_supports=NUM_SUPPORTS)
        self.plain, self.with_supports = self._collator(None), self._collator(supports)
        self.times: dict[str, list[float]] = {"draw": [], "plain": [], "supports": [], "peer": []}
        self.release = ReleaseDraws(self.index)

    def _collator(self, supports: Supports | None) -> Collator:
        return Collator(
            modalities=MODALITIES,
            processors=dict.fromkeys(MODALITIES, stacked),
            problem_type=NO_LABEL,
            num_labels=0,
            supports=supports,
        )

    def draws(self, round_number: int, *, count: int) -> None:
        """Draws for as many keys."""
        for key in range(count):
            own = (key % 31) << 1  # of the first 31 sets without modality 0
            stream = support_numbers(
                str(key), modality="m0", dataset="d", epoch=round_number, seed=0
            )
            group = group_code(str(key))
            self.index.draw(own, 0, count=NUM_SUPPORTS, stream=stream, group=group)

    def peer_draws(self, *, count: int) -> None:
        """The same by the release's rule."""
        for key in range(count):
            self.release.draw((key % 31) << 1, 0, NUM_SUPPORTS)

    def round(self, number: int, *, draws: int, peer_draws: int) -> None:
        """Measure everything once."""
        rng = np.random.default_rng(number)
        rows = [int(n) for n in rng.integers(0, min(len(self.index), 10_000), BATCH)]
        samples = [self.source.to_sample({"patient": row}) for row in rows]
        self.times["draw"].append(seconds(lambda: self.draws(number, count=draws)) / draws)
        self.times["plain"].append(seconds(lambda: self.plain(samples)))
        self.times["supports"].append(seconds(lambda: self.with_supports(samples)))
        per_draw = seconds(lambda: self.peer_draws(count=peer_draws)) / peer_draws
        self.times["peer"].append(per_draw)

    def row(self) -> dict[str, Any]:
        """What is printed and stored."""
        median = {name: statistics.median(values) for name, values in self.times.items()}
        return {
            "patients": len(self.index),
            "stream_and_write_s": round(self.stream_s, 2),
            "index_ms": round(1e3 * self.index_s, 2),
            "index_mb": round(self.index.num_bytes / 1e6, 2),
            "rss_growth_mb": round(self.grown / 1e6, 1),
            "draws_per_s": round(1 / median["draw"]),
            "peer_draw_ms": round(1e3 * median["peer"], 4),
            "draw_us": round(1e6 * median["draw"], 2),
            "batch_ms": round(1e3 * median["plain"], 3),
            "batch_with_supports_ms": round(1e3 * median["supports"], 3),
            "file_mb": round(self.file_bytes / 1e6, 1),
        }


def figures(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Largest / smallest, and ours / the peer's at the largest."""
    small, large = rows[0], rows[-1]
    return {
        "draw_cost_large_over_small": round(large["draw_us"] / small["draw_us"], 3),
        "step_cost_large_over_small": round(
            large["batch_with_supports_ms"] / small["batch_with_supports_ms"], 3
        ),
        "draw_cost_over_release": round(large["draw_us"] / 1e3 / large["peer_draw_ms"], 6),
        "index_bytes_per_patient": round(1e6 * large["index_mb"] / large["patients"], 1),
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    print(
        " patients stream_s   index_ms  index_mb    rss_mb     draws/s release_ms  batch_ms"
        " +supports"
    )
    for row in rows:
        print(
            SHOWN.format(
                *(row["patients"], row["stream_and_write_s"], row["index_ms"], row["index_mb"]),
                *(row["rss_growth_mb"], row["draws_per_s"], row["peer_draw_ms"]),
                *(row["batch_ms"], row["batch_with_supports_ms"]),
            )
        )


def main() -> None:
    """Measure, print, and store a full run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="1,000 to 100,000 patients")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    sizes = (1_000, 10_000, 100_000) if args.quick else (10_000, 100_000, 1_000_000)
    with tempfile.TemporaryDirectory() as folder:
        measured = [Measured(count, Path(folder, str(count))) for count in sizes]
        for number in range(1 + (3 if args.quick else args.rounds)):
            for one in measured:
                one.round(number, draws=2000, peer_draws=20)
        for one in measured:
            one.times = {name: values[1:] for name, values in one.times.items()}  # the warm-up
        rows = [one.row() for one in measured]
    show(rows)
    result = {"benchmark": "support_scale", "figures": figures(rows), **describe_machine()}
    if not args.quick:
        RESULTS.mkdir(exist_ok=True)
        stored = {**result, "arguments": vars(args), "rows": rows}
        Path(RESULTS, "support_scale.json").write_text(json.dumps(stored, indent=1))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
