"""One canonical order of samples, cut into global batches, dealt to ranks and workers.

The order is that of `datasets`: epoch e is `source.stream(split).shuffle(seed, buffer)` with
`set_epoch(e)` (shards in random order, rows mixed in a buffer), and epochs follow one another
without a gap. Sample i of this endless line belongs to global batch i // (batch_size * world_size);
each rank takes its contiguous slice of it. So the global batches do not depend on the number of
workers, and a run resumes at sample `start` at any world size.

Every rank (and worker) reads every row and drops those that are not its own before anything is
decoded: reading is cheap next to decoding, and exactness is worth it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import fsspec.asyn
import torch

from mm_moe.batch import Sample
from mm_moe.data.reading import reading
from mm_moe.data.schema import DataSource
from mm_moe.errors import ConfigError, DataError

READ_ROWS = 32  # rows fetched at once; small, so that a resume does not read far ahead


class SampleStream(torch.utils.data.IterableDataset):
    """The samples of one rank, undecoded, for a `DataLoader` with the same `batch_size`.

    Args:
        source: the data set.
        split: its split.
        batch_size: samples per device and step.
        rank: this process among the data-parallel ones.
        world_size: their number.
        seed: of the shuffle.
        shuffle_buffer: rows that the shuffle holds; 0 keeps the order of the source.
        start: samples that all ranks together have consumed before, over all epochs. Batches are
            counted from here.
        epochs: passes over the data from sample 0, or None for endless. In the last batch of a
            finite stream the ranks share what is left in order: late ranks may get fewer or none.

    Raises:
        ConfigError: a number out of range.
        DataError: the split does not exist, or has no row.
    """

    def __init__(
        self,
        source: DataSource,
        *,
        split: str,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        shuffle_buffer: int = 0,
        start: int = 0,
        epochs: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; it must be at least 1.")
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank {rank} is not in a world of {world_size} processes.")
        if shuffle_buffer < 0 or start < 0:
            raise ConfigError(
                f"shuffle_buffer ({shuffle_buffer}) and start ({start}) must be >= 0."
            )
        self.source, self.split = source, source.check_split(split)
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.seed, self.shuffle_buffer = seed, shuffle_buffer
        self.start, self.epochs = start, epochs
        self.size = source.size(split)  # asked once, here: it may cost a pass over the data
        if self.size == 0:
            raise DataError(f"split {split!r} of {source.name!r} has no row.")

    @property
    def num_batches(self) -> int | None:
        """Global batches from `start` to the end, equal on all ranks; None if endless or unknown.

        A rank may get one batch fewer than this: where ranks must act in step, it makes up for it
        with an empty batch.
        """
        if self.epochs is None or self.size is None:
            return None
        left = max(0, self.epochs * self.size - self.start)
        return -(-left // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[Sample]:
        worker = torch.utils.data.get_worker_info()
        index, count = (worker.id, worker.num_workers) if worker else (0, 1)
        if worker:
            fsspec.asyn.reset_lock()  # a lock inherited through a fork would hang remote reads
        for position, (epoch, row) in enumerate(self.rows()):
            batch, place = divmod(position, self.batch_size * self.world_size)
            # The loader asks its workers in turn, so batch t must come from worker t % count.
            if batch % count == index and place // self.batch_size == self.rank:
                sample = self.source.to_sample(row)
                yield sample if sample.epoch == epoch else replace(sample, epoch=epoch)

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """The canonical line of raw rows from `start` on, those of all ranks, with their epochs."""
        if self.epochs is None:
            own = self.source.line(
                self.split, seed=self.seed, shuffle_buffer=self.shuffle_buffer, start=self.start
            )
            if own is not None:
                return own
        # A known size leaps over whole epochs; without one they are read and counted.
        first, skip = divmod(self.start, self.size) if self.size else (0, self.start)
        epochs = itertools.count(first) if self.epochs is None else range(first, self.epochs)
        rows = itertools.chain.from_iterable(map(self._epoch, epochs))
        return itertools.islice(rows, skip, None)

    def _epoch(self, epoch: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """The rows of one epoch, with its number."""
        what = f"split {self.split!r} of {self.source.name!r}"
        count = 0
        with reading(what):
            stream = self.source.stream(self.split)
            if self.shuffle_buffer:
                # One shard at a time: reading several at once, `datasets` 5.2 waits five seconds
                # for PyArrow's threads at the end of every epoch.
                stream = stream.shuffle(
                    seed=self.seed, buffer_size=self.shuffle_buffer, max_buffer_input_shards=1
                )
                # Only here: set_epoch reorders the shards of an unshuffled stream, too.
                stream.set_epoch(epoch)
            # `iter`, not `__iter__`: the latter splits the shards over loader workers by itself.
            for columns in stream.iter(batch_size=READ_ROWS):
                for values in zip(*columns.values(), strict=True):
                    count += 1
                    yield epoch, dict(zip(columns, values, strict=True))
        if not count:
            raise DataError(f"{what} has no row.")
        if self.size not in (None, count):  # a resume would leap to another row
            raise DataError(
                f"{what} has {count:,} rows and not {self.size:,}, as it was told; correct the "
                "number (num_samples, sizes.json), or leave it out and give --max_steps."
            )
