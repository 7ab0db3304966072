"""The canonical order: global batches, ranks, workers, epochs, resume. Rows are their numbers."""

import pytest
from torch.utils.data import DataLoader
from toy import Numbers

from mm_moe.data.streaming import SampleStream
from mm_moe.errors import ConfigError, DataError


def batches(source, *, workers=0, take=None, **options):
    """Ids of the batches that a rank's DataLoader gives."""
    stream = SampleStream(source, split="train", **options)
    loader = DataLoader(
        stream,
        batch_size=stream.batch_size,
        num_workers=workers,
        collate_fn=lambda samples: [int(sample.id) for sample in samples],
    )
    out = []
    for batch in loader:
        out.append(batch)
        if len(out) == take:
            break
    return out


def line(source, count, **options):
    """The first `count` ids of the endless global line."""
    rows = batches(source, batch_size=1, take=count, **options)
    return [row[0] for row in rows]


@pytest.fixture
def ten(tmp_path):
    return Numbers.write(tmp_path, rows=10)


def test_batches_by_hand(ten):
    # global batches of 2 ranks x 2: [0 1 | 2 3] [4 5 | 6 7] [8 9]: rank 1 has nothing left
    first = batches(ten, batch_size=2, rank=0, world_size=2, epochs=1)
    second = batches(ten, batch_size=2, rank=1, world_size=2, epochs=1)
    assert first == [[0, 1], [4, 5], [8, 9]]
    assert second == [[2, 3], [6, 7]]


def test_epochs_follow_without_gap(ten):
    # batches of 4 over 10 rows: the third runs into the next epoch
    assert batches(ten, batch_size=4, take=4) == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 0, 1],
        [2, 3, 4, 5],
    ]


def test_samples_are_undecoded_samples(ten):
    sample = next(iter(SampleStream(ten, split="train", batch_size=1)))
    assert (sample.id, sample.payload, sample.label) == ("0", {"text": "number 0"}, 0)


def test_shuffle_is_deterministic_and_depends_on_seed_and_epoch(tmp_path):
    source = Numbers.write(tmp_path, rows=30, shards=3)
    options = {"shuffle_buffer": 8, "seed": 5}
    once, again = line(source, 90, **options), line(source, 90, **options)
    assert once == again
    epochs = [once[:30], once[30:60], once[60:]]
    assert all(sorted(epoch) == list(range(30)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert line(source, 30, shuffle_buffer=8, seed=6) != epochs[0]


def test_without_shuffle_every_epoch_has_the_order_of_the_source(tmp_path):
    source = Numbers.write(tmp_path, rows=6, shards=3)
    assert line(source, 18) == list(range(6)) * 3


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_and_workers_give_the_same_global_batches(tmp_path, shards, world_size):
    source = Numbers.write(tmp_path, rows=26, shards=shards)
    per_rank = 4 // world_size
    options = {"shuffle_buffer": 10, "seed": 1}
    expected = line(source, 40, **options)
    for workers in (0, 2):
        ranks = [
            batches(
                source,
                batch_size=per_rank,
                rank=rank,
                world_size=world_size,
                workers=workers,
                take=10,
                **options,
            )
            for rank in range(world_size)
        ]
        together = [row for step in zip(*ranks, strict=True) for part in step for row in part]
        assert together == expected, f"{workers} workers"


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_every_sample_exactly_once(tmp_path, world_size, workers):
    source = Numbers.write(tmp_path, rows=13, shards=2)
    seen = []
    for rank in range(world_size):
        options = {"batch_size": 3, "rank": rank, "world_size": world_size, "workers": workers}
        for batch in batches(source, epochs=1, **options):
            assert 1 <= len(batch) <= 3
            seen += batch
    assert sorted(seen) == list(range(13))


@pytest.mark.parametrize("start", [12, 20, 44])  # 20 rows: inside, at and beyond an epoch
@pytest.mark.parametrize(
    ("world_size", "workers", "knows_size"),
    [(1, 0, True), (2, 2, True), (4, 0, True), (2, 0, False)],
)
def test_resume_continues_the_line_at_any_world_size(
    tmp_path, start, world_size, workers, knows_size
):
    source = Numbers.write(tmp_path, rows=20, shards=2, knows_size=knows_size)
    options = {"shuffle_buffer": 7, "seed": 3}
    expected = line(source, start + 24, **options)[start:]
    ranks = [
        batches(
            source,
            batch_size=2,
            rank=rank,
            world_size=world_size,
            workers=workers,
            start=start,
            take=24 // (2 * world_size),
            **options,
        )
        for rank in range(world_size)
    ]
    together = [row for step in zip(*ranks, strict=True) for part in step for row in part]
    assert together == expected


def over_ranks(source, *, world_size, take, **options):
    """The ids that all ranks together take in `take` steps, in the global order."""
    ranks = [
        batches(source, rank=rank, world_size=world_size, take=take, **options)
        for rank in range(world_size)
    ]
    return [row for step in zip(*ranks, strict=True) for part in step for row in part]


@pytest.mark.parametrize("shuffle_buffer", [0, 4, 50])  # none, small, larger than the data
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_epoch_has_every_sample_once(tmp_path, workers, world_size, shuffle_buffer):
    # 13 rows, batches of 3 a rank: neither divides the other; 13 steps are 3 epochs for each rank
    source = Numbers.write(tmp_path, rows=13, shards=3)
    options = {"batch_size": 3, "workers": workers, "shuffle_buffer": shuffle_buffer, "seed": 2}
    together = over_ranks(source, world_size=world_size, take=13, **options)
    epochs = [together[start : start + 13] for start in range(0, len(together), 13)]
    assert len(epochs) == 3 * world_size
    assert all(set(epoch) == set(range(13)) for epoch in epochs)


@pytest.mark.parametrize(
    ("before", "after", "workers"), [(1, 1, 2), (2, 2, 0), (2, 4, 0), (4, 1, 2)]
)
def test_forty_batches_then_a_resume_then_eight(tmp_path, before, after, workers):
    source = Numbers.write(tmp_path, rows=130, shards=3)
    options = {"shuffle_buffer": 20, "seed": 4}
    # global batches of 12 however many ranks: 480 samples are three epochs and 90 rows
    first = over_ranks(source, world_size=before, take=40, batch_size=12 // before, **options)
    assert len(first) == 480
    more = {"batch_size": 12 // after, "workers": workers, "start": 480, **options}
    then = over_ranks(source, world_size=after, take=8, **more)
    assert first + then == line(source, 576, **options)
    assert set(first[390:] + then[:40]) == set(range(130))  # the epoch that was cut in two


def test_finite_epochs_and_number_of_batches(ten):
    def stream(**options):
        return SampleStream(ten, split="train", **options)

    assert stream(batch_size=2, world_size=2, epochs=1).num_batches == 3  # ceil(10 / 4)
    assert stream(batch_size=2, world_size=2, epochs=2, start=12).num_batches == 2  # ceil(8 / 4)
    assert stream(batch_size=2, epochs=1, start=10).num_batches == 0
    assert stream(batch_size=2).num_batches is None
    assert batches(ten, batch_size=4, epochs=2, start=12) == [[2, 3, 4, 5], [6, 7, 8, 9]]
    assert batches(ten, batch_size=4, epochs=1, start=10) == []


def test_bad_numbers_and_splits(ten, tmp_path):
    with pytest.raises(ConfigError, match="batch_size is 0"):
        SampleStream(ten, split="train", batch_size=0)
    with pytest.raises(ConfigError, match="rank 2 is not in a world of 2"):
        SampleStream(ten, split="train", batch_size=1, rank=2, world_size=2)
    with pytest.raises(ConfigError, match="start"):
        SampleStream(ten, split="train", batch_size=1, start=-1)
    with pytest.raises(DataError, match="no split 'dev'; it has: train"):
        SampleStream(ten, split="dev", batch_size=1)


def test_an_empty_split_is_an_error_not_an_endless_loop(tmp_path):
    empty = Numbers.write(tmp_path, rows=0)
    with pytest.raises(DataError, match="has no row"):
        next(iter(SampleStream(empty, split="train", batch_size=1)))


def test_a_damaged_file_is_named_without_its_content(tmp_path):
    source = Numbers.write(tmp_path, rows=5, knows_size=False)
    file = tmp_path / "0.parquet"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match="split 'train' of 'numbers' cannot be read: Arrow"):
        next(iter(SampleStream(source, split="train", batch_size=1)))
