"""What every registered data set promises, checked on the data where they are, else on a fixture.

A new data set is tested by its registry line alone, if it can be built without arguments; otherwise
it needs a line in `BUILD`.
"""

import json
import os
import pickle
import re
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from launch import prepare_data
from mm_moe.data.schema import PROBLEM_TYPES, TASKS, DataSource
from mm_moe.data.streaming import SampleStream
from mm_moe.errors import DataError
from mm_moe.registry import DATASETS, RAW_DATASETS
from tests import pairs_data, patient_layouts, raw_layouts

LOOK = 200  # samples of a split that are looked at


def shared_data() -> Path:
    """The folder of the real data sets, or a skip that says how to name it."""
    beside = Path(__file__).parents[3] / "shared" / "data"
    folder = Path(os.environ.get("MM_MOE_DATA", beside))
    if not folder.is_dir():
        pytest.skip(f"no data in {folder}; set MM_MOE_DATA to the folder of the data sets")
    return folder


def tables(tmp_path: Path) -> Path:
    for split in ("train", "validation", "test"):
        texts = [f"{split} text {n}" for n in range(12)]
        labels = ["pear", "apple", "fig"] * 4
        ids = [f"{split}-{n}" for n in range(12)]
        table = pa.table({"key": ids, "words": texts, "kind": labels})
        pq.write_table(table, tmp_path / f"{split}.parquet")
    return tmp_path


def prepared(cls, tmp_path: Path) -> DataSource:
    """A data set through the program that prepares it, from its raw layout."""
    name = cls.expected or "food101"
    if name in ("iemocap", "fastmri_knee"):
        pytest.importorskip("h5py", reason="pip install h5py")
    if name == "adni":
        for needed in ("nibabel", "anndata"):
            pytest.importorskip(needed, reason="pip install -e '.[clinical]'")
    raw = raw_layouts.MAKERS[name](tmp_path / "raw")
    flags = ["--source", str(raw), "--output", str(tmp_path / "out")]
    assert prepare_data.main([name, *flags]) == 0
    return cls(str(tmp_path / "out"))


def cached_features(cls, tmp_path: Path) -> DataSource:
    """The features of three splits of twelve texts."""
    options = {"text_column": "words", "label_column": "kind", "id_column": "key"}
    flags = ["--dataset", "columns", "--data_dir", str(tables(tmp_path)), "--use_cpu"]
    flags += ["--dataset_options", json.dumps(options), "--pretrained", "builtin"]
    assert prepare_data.main(["features", *flags, "--output", str(tmp_path / "out")]) == 0
    return cls(str(tmp_path / "out"))


def shards(tmp_path: Path) -> str:
    for split in ("train", "validation", "test"):
        pairs_data.write_shards(tmp_path / "shards", rows=6, shards=2, split=split)
    return str(tmp_path / "shards")


def mixture(cls, tmp_path: Path) -> DataSource:
    columns = {"text_column": "words", "label_column": "kind", "id_column": "key"}
    parts = [
        {"dataset": "columns", "data_dir": str(tables(tmp_path)), "options": columns},
        {"dataset": "webdataset", "data_dir": shards(tmp_path), "weight": 3},
    ]
    return cls(parts=parts, scored="webdataset")


def cells(cls, tmp_path: Path) -> DataSource:
    pytest.importorskip("anndata", reason="pip install -e '.[single_cell]'")
    from tests.cell_files import two_species

    folder = two_species(tmp_path / "cells")
    return cls(str(folder), conditions=["species", "donor"], label="cell_type", group="donor")


BUILD = {
    "cells": cells,
    "prepared": prepared,
    "webdataset": lambda cls, tmp: cls(shards(tmp)),
    "mixture": mixture,
    **dict.fromkeys(RAW_DATASETS, prepared),
    "columns": lambda cls, tmp: cls(
        str(tables(tmp)), text_column="words", label_column="kind", id_column="key"
    ),
    "openclipart_emoji": lambda cls, tmp: cls(str(shared_data())),
    "cached_features": cached_features,
    "vqa_rad": lambda cls, tmp: cls(str(shared_data()), questions="all"),
    "nlvr": lambda cls, tmp: cls(str(shared_data())),
    "grocery": lambda cls, tmp: cls(str(shared_data())),
    "tcga_luad": lambda cls, tmp: cls(str(patient_layouts.tcga_luad(tmp))),
    "physionet2012": lambda cls, tmp: cls(
        str(patient_layouts.physionet2012(tmp)), split_series=True
    ),
}


@pytest.fixture(params=sorted(DATASETS))
def source(request, tmp_path) -> DataSource:
    cls = DATASETS.resolve(request.param)
    return BUILD.get(request.param, lambda cls, tmp: cls())(cls, tmp_path)


def look(source, split, **options):
    stream = SampleStream(source, split=split, batch_size=1, epochs=1, **options)
    return list(islice(stream, LOOK))


def test_describes_itself(source):
    assert source.name
    assert source.license
    assert source.modalities
    assert source.problem_type in PROBLEM_TYPES
    assert "train" in source.splits()
    assert len(set(source.label_names)) == len(source.label_names)
    assert source.task is None or TASKS[source.task] == source.problem_type
    assert bool(source.label_names) == (source.problem_type in PROBLEM_TYPES[:2])


def test_samples_keep_the_contract(source):
    for split in source.splits():
        for sample in look(source, split):
            assert isinstance(sample.id, str)
            assert set(sample.payload) <= set(source.modalities)
            assert all(value is not None for value in sample.payload.values())
            if source.problem_type == "single_label_classification" and sample.label is not None:
                assert 0 <= sample.label < len(source.label_names)
            if source.problem_type == "none":
                assert sample.label is None


def test_ids_are_unique_over_all_splits(source):
    ids = [sample.id for split in source.splits() for sample in look(source, split)]
    assert len(set(ids)) == len(ids)


def test_order_is_fixed_and_sizes_are_exact(source):
    first = [sample.id for sample in look(source, "train")]
    assert first == [sample.id for sample in look(source, "train")]
    for split in source.splits():
        size = source.size(split)
        count = sum(len(columns["id"]) for columns in _ids(source, split))
        assert size is None or size == count > 0


def _ids(source, split):
    stream = source.stream(split)
    for columns in stream.iter(batch_size=500):
        yield {"id": next(iter(columns.values()))}


def test_index_tells_the_same_ids_and_labels(source):
    for split in source.splits():
        found = islice(source.index(split), LOOK)
        assert [(s.id, s.label, s.mask_key) for s in found] == [
            (s.id, s.label, s.mask_key) for s in look(source, split)
        ]


def test_goes_to_workers_and_knows_its_content(source):
    twin = pickle.loads(pickle.dumps(source))
    assert look(twin, "train") == look(source, "train")
    assert re.fullmatch(r"[0-9a-f]{64}", source.fingerprint())
    assert twin.fingerprint() == source.fingerprint()


def test_an_unknown_split_lists_the_known_ones(source):
    with pytest.raises(DataError, match=source.splits()[0]):
        source.stream("nowhere")
