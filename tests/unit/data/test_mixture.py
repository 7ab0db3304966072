"""Mixtures: which part gives which sample, and that it depends on nothing else."""

import pickle
from collections import Counter
from itertools import islice

import numpy as np
import pytest
from torch.utils.data import DataLoader
from toy import Numbers

from mm_moe.data.sets.mixture import MixtureData, uniform_at
from mm_moe.data.streaming import SampleStream
from mm_moe.errors import ConfigError, DataError
from tests.pairs_data import write_shards


@pytest.fixture
def folders(tmp_path):
    for name, rows in (("ten", 10), ("four", 4)):
        (tmp_path / name).mkdir()
        Numbers.write(tmp_path / name, rows=rows)
    write_shards(tmp_path / "pairs", rows=6, shards=2)
    return tmp_path


def mixture(folders, *, weights=(3, 1), **options):
    parts = [
        {"dataset": "toy:Numbers", "data_dir": str(folders / name), "name": name, "weight": weight}
        for name, weight in zip(("ten", "four"), weights, strict=True)
    ]
    return MixtureData(parts=parts, **options)


def line(source, count, **options):
    stream = SampleStream(source, split="train", batch_size=1, **options)
    return [(sample.id, sample.epoch) for sample in islice(stream, count)]


def test_parts_are_drawn_by_weight_and_go_through_their_own_epochs(folders):
    found = line(mixture(folders), 4000)
    shares = Counter(name.partition(":")[0] for name, _ in found)
    assert 0.72 < shares["ten"] / 4000 < 0.78
    for part, rows in (("ten", 10), ("four", 4)):
        own = [(name, epoch) for name, epoch in found if name.startswith(f"{part}:")]
        assert own[: 2 * rows] == [
            (f"{part}:{n}", epoch) for epoch in range(2) for n in range(rows)
        ]


@pytest.mark.parametrize("buffer", [0, 3])
def test_a_resume_goes_on_exactly(folders, buffer):
    source = mixture(folders)
    whole = line(source, 90, shuffle_buffer=buffer, seed=5)
    for start in (1, 17, 60):
        twin = pickle.loads(pickle.dumps(source))
        assert line(twin, 30, shuffle_buffer=buffer, seed=5, start=start) == whole[start:][:30]
    assert line(source, 90, shuffle_buffer=buffer, seed=6) != whole


def test_ranks_and_workers_deal_out_the_same_line(folders):
    whole = [name for name, _ in line(mixture(folders), 24)]
    for workers in (0, 2):
        ranks = []
        for rank in range(2):
            stream = SampleStream(
                mixture(folders), split="train", batch_size=2, rank=rank, world_size=2
            )
            loader = DataLoader(
                stream, 2, num_workers=workers, collate_fn=lambda rows: [r.id for r in rows]
            )
            ranks.append(list(islice(loader, 6)))
        assert [name for pair in zip(*ranks, strict=True) for b in pair for name in b] == whole


def test_choices_are_counted_without_being_listed(folders):
    source = mixture(folders)
    chosen = source.choices(0, 1000, seed=2)
    assert source.drawn_before(700, seed=2).tolist() == np.bincount(chosen[:700]).tolist()
    assert source.choices(123, 50, seed=2).tolist() == chosen[123:173].tolist()
    draws = uniform_at(0, 20_000, key="k")
    counts, _ = np.histogram(draws, bins=20, range=(0, 1))
    assert abs(counts - 1000).max() < 150  # 5 standard deviations
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.03


def test_one_pass_has_every_row_once_and_labels_that_are_equal_stay(folders):
    source = mixture(folders)
    stream = SampleStream(source, split="train", batch_size=1, epochs=1)
    found = list(stream)
    assert [sample.id for sample in found] == [
        *(f"ten:{n}" for n in range(10)),
        *(f"four:{n}" for n in range(4)),
    ]
    assert source.size("train") == 14
    assert source.label_names == ("even", "odd")
    assert [sample.label for sample in found] == [n % 2 for n in [*range(10), *range(4)]]
    assert [s.id for s in source.index("train")] == [s.id for s in found]


def test_other_modalities_are_missing_and_other_labels_dropped(folders):
    parts = [
        {"dataset": "toy:Numbers", "data_dir": str(folders / "four")},
        {"dataset": "webdataset", "data_dir": str(folders / "pairs"), "name": "pairs"},
    ]
    source = MixtureData(parts=[{**parts[0], "name": "four"}, parts[1]])
    assert source.modalities == ("text", "image")
    assert source.problem_type == "none"
    assert source.size("train") is None
    found = {s.id: s for s in SampleStream(source, split="train", batch_size=1, epochs=1)}
    assert len(found) == 10
    assert set(found["four:1"].payload) == {"text"}
    assert set(found["pairs:train-0/0000"].payload) == {"image", "text"}
    assert all(sample.label is None for sample in found.values())


def test_validation_is_that_of_one_part(folders):
    write_shards(folders / "pairs", rows=2, shards=1, split="val")
    parts = [
        {"dataset": "toy:Numbers", "data_dir": str(folders / "four"), "name": "four"},
        {"dataset": "webdataset", "data_dir": str(folders / "pairs"), "name": "pairs"},
    ]
    source = MixtureData(parts=parts)
    assert source.splits() == ("train", "validation")
    found = SampleStream(source, split="validation", batch_size=1, epochs=1)
    assert [s.id for s in found] == ["pairs:val-0/0000", "pairs:val-0/0001"]
    assert MixtureData(parts=parts, scored="four").splits() == ("train",)


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ({"weight": 0}, {}, "weight 0; it must be"),
        ({"weight": -2.0}, {}, "weight -2.0"),
        ({"weight": "3"}, {}, "weight '3'"),
        ({"dataset": "emojy"}, {}, "unknown data set 'emojy'; did you mean emoji"),
        ({"wieght": 1}, {}, "no setting 'wieght'; did you mean weight"),
        ({"options": {"colour": 1}}, {}, "options of part 0"),
        ({"name": "four"}, {}, "called 'four'"),
        ({}, {"scored": "fuor"}, "no part 'fuor'; did you mean four"),
    ],
)
def test_mixtures_that_cannot_be(folders, change, options, words):
    first = {"dataset": "toy:Numbers", "data_dir": str(folders / "ten"), "name": "ten", **change}
    second = {"dataset": "toy:Numbers", "data_dir": str(folders / "four"), "name": "four"}
    with pytest.raises(ConfigError, match=words):
        MixtureData(parts=[first, second], **options)


def test_no_part_and_no_split_are_refused(folders):
    with pytest.raises(ConfigError, match="needs parts"):
        MixtureData()
    with pytest.raises(DataError, match="has no split 'dev'"):
        MixtureData(parts=[{"dataset": "emoji", "split": "dev"}])
