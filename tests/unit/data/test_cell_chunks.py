"""Chunks of counts with metadata, and the Parquet that is made of any form."""

import json
import pickle

import numpy as np
import pandas as pd
import pytest
import scipy.sparse

from launch import prepare_data
from mm_moe.data.cells.pickled_tables import read_table
from mm_moe.data.cells.rows import CellProcessor
from mm_moe.data.sets.cells import CellsData
from mm_moe.data.streaming import SampleStream
from mm_moe.errors import ConfigError, DataError
from tests.cell_files import counts

FORMS = {
    "parquet": pd.DataFrame.to_parquet,
    "csv": lambda table, path: table.to_csv(path, index=False),
    "pkl": pd.DataFrame.to_pickle,
}


def write_chunk(folder, species="human", number=0, *, cells=5, genes=4, form="parquet"):
    values = counts(cells, genes, seed=number)
    path = folder / f"{species}_counts_{number}.npz"
    scipy.sparse.save_npz(path, scipy.sparse.csr_matrix(values))
    ids = [f"{species}{number}-{n}" for n in range(cells)]
    donors = pd.Categorical([f"d{n % 2}" for n in range(cells)])
    table = pd.DataFrame({"cell_id": ids, "donor": donors, "age": np.arange(cells) + 0.5})
    FORMS[form](table, folder / f"{species}_metadata_{number}.{form}")
    return values


def found(source, split="train", **options):
    genes = {species: len(names) for species, names in source.vocabulary.genes.items()}
    rows = {}
    for sample in SampleStream(source, split=split, batch_size=1, epochs=1, **options):
        ((species, cell),) = sample.payload.items()
        dense = CellProcessor(genes[species], form="dense")([cell])["values"][0]
        rows[sample.id] = (dense.tolist(), cell.conditions, cell.library)
    return rows


def wanted(values, species="human", number=0):
    stem = f"{species}/{species}_counts_{number}:{species}{number}"
    return {f"{stem}-{n}": (row.tolist(), (n % 2 + 1,), row.sum()) for n, row in enumerate(values)}


@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_rows_of_several_chunks_keep_their_metadata(tmp_path, form):
    rows = {}
    for species, number, cells in (("human", 0, 5), ("human", 10, 40), ("mouse", 0, 3)):
        values = write_chunk(tmp_path, species, number, cells=cells, form=form)
        rows |= wanted(values, species, number)
    source = CellsData(str(tmp_path), conditions=["donor"], shares=(1, 0, 0))
    assert found(source) == rows == found(source, shuffle_buffer=8)
    stream = SampleStream(source, split="train", batch_size=1, shuffle_buffer=8)
    drawn = [sample.id for sample, _ in zip(stream, range(48), strict=False)]
    assert sorted(drawn) == sorted(rows)


def test_chunks_as_splits_and_names_of_genes(tmp_path):
    for number in (1, 2):
        write_chunk(tmp_path, number=number)
    (tmp_path / "human_genes.txt").write_text("A\nB\nC\nD\n")
    files = {"human": {"train": "human_counts_1.npz", "validation": "human_counts_2.npz"}}
    source = CellsData(str(tmp_path), files=files)
    assert source.splits() == ("train", "validation")
    assert source.vocabulary.genes == {"human": ("A", "B", "C", "D")}
    (tmp_path / "human_genes.txt").write_text("A\nB\n")
    with pytest.raises(DataError, match=r"names 2 genes, .* has 4"):
        CellsData(str(tmp_path), files=files)


def test_cut_chunks_and_metadata_of_another_are_told(tmp_path):
    write_chunk(tmp_path)
    path = tmp_path / "human_counts_0.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(DataError, match="is cut"):
        CellsData(str(tmp_path))
    damaged = bytearray(whole)
    damaged[len(whole) // 3 : len(whole) // 3 + 60] = bytes(60)
    path.write_bytes(bytes(damaged))
    with pytest.raises(DataError, match=r"cut or|is cut"):
        CellsData(str(tmp_path))
    path.write_bytes(whole)
    pd.DataFrame({"cell_id": ["a", "b"]}).to_parquet(tmp_path / "human_metadata_0.parquet")
    with pytest.raises(DataError, match=r"has 5 cells, but .* has 2 rows"):
        CellsData(str(tmp_path))
    (tmp_path / "human_metadata_0.parquet").unlink()
    with pytest.raises(DataError, match="no metadata beside it"):
        CellsData(str(tmp_path))
    scipy.sparse.save_npz(path, scipy.sparse.csc_matrix(counts(5, 4)))
    with pytest.raises(DataError, match="holds a csc matrix"):
        CellsData(str(tmp_path))


def test_a_pickle_is_refused_and_converted(tmp_path, capsys):
    (tmp_path / "raw").mkdir()
    values = write_chunk(tmp_path / "raw", cells=7, form="pkl")
    values[3] = 0
    path = tmp_path / "raw" / "human_counts_0.npz"
    scipy.sparse.save_npz(path, scipy.sparse.csr_matrix(values))
    with pytest.raises(DataError, match=r"can run any program.*prepare_data.py cells"):
        CellsData(str(tmp_path / "raw"))
    flags = ["cells", "--source", str(tmp_path / "raw"), "--output", str(tmp_path / "out")]
    assert prepare_data.main(flags) == 0
    assert "human: 6 cells of 4 genes; not used: 1 all-zero" in capsys.readouterr().out
    lines = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"id": "human/human_counts_0:human0-3", "why": "all-zero"}
    ]
    options = {"conditions": ["donor"], "shares": (1, 0, 0)}
    source = CellsData(str(tmp_path / "out"), **options)
    rows = wanted(values)
    del rows["human/human_counts_0:human0-3"]
    assert found(source) == rows
    assert set(source.files[0].store.columns) == {"species", "split", "cell_id", "donor", "age"}
    with pytest.raises(ConfigError, match="holds something already"):
        prepare_data.main(flags)


def test_converted_cells_keep_ids_splits_and_order(tmp_path):
    (tmp_path / "raw").mkdir()
    for species, cells in (("human", 60), ("mouse", 30)):
        write_chunk(tmp_path / "raw", species, cells=cells)
    flags = ["cells", "--source", str(tmp_path / "raw"), "--output", str(tmp_path / "out")]
    assert prepare_data.main(flags) == 0
    raw = CellsData(str(tmp_path / "raw"), conditions=["donor"])
    made = CellsData(str(tmp_path / "out"), conditions=["donor"], split_column="split")
    assert made.splits() == raw.splits() == ("train", "validation", "test")
    for split in raw.splits():
        assert found(made, split) == found(raw, split)
    cut = next((tmp_path / "out").glob("mouse*.parquet"))
    cut.write_bytes(cut.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read"):
        CellsData(str(tmp_path / "out"))


class Program:
    def __reduce__(self):
        return eval, ("1/0",)


def test_no_pickle_runs_a_program(tmp_path):
    path = tmp_path / "bad.pkl"
    for content, words in (
        (Program(), "asks for builtins.eval"),
        ([1], "holds a list"),
        (pd.DataFrame({"a": [Program()]}, dtype=object), "asks for builtins.eval"),
    ):
        path.write_bytes(pickle.dumps(content))
        with pytest.raises(DataError, match=words):
            read_table(path)
    path.write_bytes(b"\x80\x04nonsense")
    with pytest.raises(DataError, match="no pickle of a table"):
        read_table(path)
    table = pd.DataFrame(
        {"text": ["a", None], "kind": pd.Categorical(["x", "y"]), "n": [1, 2], "r": [0.5, 1]},
        index=pd.Index(["one", "two"], name="cell"),
    )
    table.to_pickle(path)
    pd.testing.assert_frame_equal(read_table(path), table)
