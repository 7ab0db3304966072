"""Files of cells that are damaged, or not what they say: named, never read into nonsense."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import scipy.sparse

from mm_moe.batch import Sample
from mm_moe.data.sets.cells import CellsData
from mm_moe.errors import ConfigError, DataError

pytest.importorskip("anndata", reason="pip install -e '.[single_cell]'")
import h5py

from tests.cell_files import counts, write_h5ad

VALUES = counts(12, 4)
ROWS = scipy.sparse.csr_matrix(VALUES)
PLACES = np.split(ROWS.indices, ROWS.indptr[1:-1])
GENES = {b"genes": json.dumps(["a", "b", "c", "d"]).encode()}
CHECKED = {**GENES, b"checked": b"counts"}


def read_all(source: CellsData) -> list[Sample]:
    return [source.to_sample(row) for row in source.stream("train")]


def replaced(key, value):
    def change(file):
        del file[key]
        file[key] = value

    return change


@pytest.mark.parametrize(
    ("form", "change"),
    [
        ("csr", lambda file: file["X/indptr"].__setitem__(3, 10**6)),
        ("csr", replaced("X/indptr", np.arange(3))),
        ("csr", replaced("X/indices", np.linspace(0.0, 3.0, ROWS.nnz))),
        ("csr", replaced("X/indices", ROWS.indices.astype(np.int64) + 2**32)),
        ("csr", replaced("X/data", np.array([b"1"] * ROWS.nnz))),
        ("csr", lambda file: file.__delitem__("X/indices")),
        ("csc", lambda file: file["X/indices"].__setitem__(0, 10**6)),
        ("csc", lambda file: file["X/indptr"].__setitem__(1, -(10**6))),
        ("csr", replaced("X", np.float32(1))),
        ("csr", lambda file: file["X"].attrs.__setitem__("shape", "ab")),
    ],
)
def test_a_damaged_h5ad_is_told(tmp_path, form, change):
    path = write_h5ad(tmp_path / "human.h5ad", VALUES, form=form)
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(DataError, match=r"human.h5ad.*(get the file again|no matrix of cells)"):
        CellsData(str(tmp_path))


def test_bytes_that_were_flipped_are_told_or_read(tmp_path):
    path = write_h5ad(tmp_path / "human.h5ad", VALUES, obs={"donor": ["x", "y"] * 6})
    whole, drawn = path.read_bytes(), np.random.default_rng(0)
    for place in drawn.integers(0, len(whole), 40):
        path.write_bytes(whole[:place] + drawn.bytes(4) + whole[place + 4 :])
        with contextlib.suppress(DataError):
            list(CellsData(str(tmp_path), conditions=["donor"]).index("train"))


def test_a_gene_twice_in_a_cell_is_refused_and_any_order_is_fine(tmp_path):
    write_h5ad(path := tmp_path / "human.h5ad", np.ones((3, 4), np.float32))
    backwards = np.tile([3, 2, 1, 0], 3)
    with h5py.File(path, "r+") as file:
        file["X/indices"][:] = backwards
    assert CellsData(str(tmp_path)).dropped == {"human": {}}
    with h5py.File(path, "r+") as file:
        file["X/indices"][5] = 1  # of the second cell, beside the 1 that it has
    with pytest.raises(DataError, match=r"'c1' \(row 1\) has gene 'g1' twice"):
        CellsData(str(tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        {"format": np.array("csr")},
        {"indptr": np.zeros(0, np.int64)},
        {"indptr": np.zeros((3, 2), np.int64)},
        {"indptr": np.array(3)},
        {"indices": np.linspace(0.0, 3.0, ROWS.nnz)},
        {"data": np.array(["1"] * ROWS.nnz)},
    ],
    ids=str,
)
def test_a_damaged_chunk_is_told(tmp_path, change):
    parts = {name: getattr(ROWS, name) for name in ("indptr", "indices", "data")}
    parts |= {"format": np.array(b"csr"), "shape": np.array(ROWS.shape)} | change
    np.savez(tmp_path / "human_counts_0.npz", **parts)
    (tmp_path / "human_metadata_0.csv").write_text("donor\n" + "x\n" * len(VALUES))
    with pytest.raises(DataError, match=r"human_counts_0.npz.*(is cut|cut or damaged)"):
        CellsData(str(tmp_path))


@pytest.mark.parametrize(
    ("about", "change", "words"),
    [
        ({}, {}, "lacks the names of genes"),
        ({b"genes": b"3"}, {}, "no JSON list"),
        (GENES, {"indices": pa.array(["1"] * 12)}, "'indices' of lists of whole numbers"),
        (GENES, {"indices": pa.array([[0.5]] * 12)}, "'indices' of lists of whole numbers"),
        (GENES, {"values": pa.array([["1"]] * 12)}, "'values' of lists of numbers"),
        (GENES, {"indices": pa.array([p + np.int64(2**32) for p in PLACES])}, "cut or damaged"),
        (GENES, {"values": pa.array([[None] * len(p) for p in PLACES], pa.list_(pa.float32()))},
         "empty place"),
        (CHECKED, {}, "the sums of its cells"),
        (CHECKED, {"library": pa.array([0.0] * 12)}, "not above 0"),
        (CHECKED, {"library": pa.array([1.0] * 12),
                   "values": pa.array([[-1.0] * len(p) for p in PLACES], pa.list_(pa.float32()))},
         "below 0"),
    ],
)  # fmt: skip
def test_a_table_of_another_schema_is_told(tmp_path, about, change, words):
    columns = {
        "indices": pa.array(PLACES, pa.list_(pa.int32())),
        "values": pa.array(np.split(ROWS.data, ROWS.indptr[1:-1]), pa.list_(pa.float32())),
        **change,
    }
    table = pa.table(columns).replace_schema_metadata(about)
    pq.write_table(table, tmp_path / "human_counts_0.parquet")
    with pytest.raises(DataError, match=words):
        read_all(CellsData(str(tmp_path)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"files": {"human": ["human.h5ad", "human.h5ad"]}}, "names human.h5ad twice"),
        ({"files": {"human": {"train": "human.h5ad", "test": "human.h5ad"}}}, "twice"),
        ({"files": {"human": {"path": "human.h5ad", "only": {"donor": 5}}}}, "object of labels"),
        ({"conditions": "donor"}, "list of different columns"),
        ({"conditions": ["donor", "donor"]}, "list of different columns"),
        ({"shares": 3}, "three numbers"),
        ({"memory_mib": "much"}, "must be a number"),
        ({"sampler": 3}, "unknown species sampler"),
        ({"run": 1.5}, "whole number"),
        ({"vocabulary": {"genes": 3, "conditions": {}}}, "object of lists"),
        ({"vocabulary": {"genes": {"human": ["a", "a"]}, "conditions": {}}}, "twice"),
    ],
)
def test_an_option_of_another_kind_is_named(tmp_path, options, words):
    write_h5ad(tmp_path / "human.h5ad", VALUES, obs={"donor": ["x", "y"] * 6})
    with pytest.raises(ConfigError, match=words):
        CellsData(str(tmp_path), **options)
