"""Bad cells by the command line: refused in one line before a folder is made, or counted."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse

from launch import prepare_data
from launch.checks import check_same_model
from launch.cli import RecipeParser
from launch.run import check
from mm_moe.data.unlabelled import Unlabelled
from mm_moe.errors import CheckpointError, DataError, MMMoEError
from tests.unit.cells.cell_batches import config

pytest.importorskip("anndata", reason="pip install -e '.[single_cell]'")
from tests.cell_files import counts, two_species, write_h5ad

RECIPE = ["--config", "pretrain/recipes/mmvae_human_mouse.yaml"]


class Program:
    """What no reader of metadata may run."""

    def __reduce__(self):
        return print, ("ran",)


def negative(folder: Path) -> None:
    values = counts(40, 6)
    values[7, 2] = -1
    write_h5ad(folder / "human.h5ad", values)


def fractions(folder: Path) -> None:
    write_h5ad(folder / "human.h5ad", counts(40, 6) / 2)


def mixed(folder: Path) -> None:
    write_h5ad(folder / "human.h5ad", counts(40, 6), obs={"species": ["human", "mouse"] * 20})


def truncated(folder: Path) -> None:
    whole = (folder / "human.h5ad").read_bytes()
    (folder / "human.h5ad").write_bytes(whole[: len(whole) // 2])


def chunk(folder: Path, metadata: bytes, ending: str) -> Path:
    (folder / "human.h5ad").unlink()
    path = folder / "human_counts_0.npz"
    scipy.sparse.save_npz(path, scipy.sparse.csr_matrix(counts(4, 6)))
    (folder / f"human_metadata_0{ending}").write_bytes(metadata)
    return path


def cut_chunk(folder: Path) -> None:
    path = chunk(folder, b"donor\na\nb\nc\nd\n", ".csv")
    path.write_bytes(path.read_bytes()[:200])


def program(folder: Path) -> None:
    chunk(folder, pickle.dumps(Program()), ".pkl")


def other_table(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "human.h5ad").unlink()
    pq.write_table(pa.table({"donor": ["a"]}), folder / "human_counts_0.parquet")


CASES = [
    (negative, "'c7' (row 7) has -1 for gene 'g2'; counts are whole numbers from 0"),
    (fractions, "counts are whole numbers from 0"),
    (mixed, "holds cells of several species (human, mouse)"),
    (truncated, "is cut, or no HDF5 file"),
    (cut_chunk, "is cut, or no sparse matrix"),
    (program, "can run any program"),
    (other_table, "is no table of cells"),
]


@pytest.fixture
def folder(tmp_path) -> Path:
    return two_species(tmp_path / "data", cells=40)


@pytest.mark.parametrize(("spoil", "words"), CASES)
def test_training_and_preparing_refuse(folder, tmp_path, capsys, spoil, words):
    spoil(folder)
    output = tmp_path / "out"
    argv = [*RECIPE, "--data_dir", str(folder), "--dataset_options", "{}"]
    values = RecipeParser().namespace([*argv, "--output_dir", str(output)])
    flags = ["cells", "--source", str(folder), "--output", str(output)]
    for program_of, said in (
        (lambda: check(values, argv), words),
        # it reads pickles, by a reader that knows tables alone
        (lambda: prepare_data.main(flags), "is no part of a table" if spoil is program else words),
    ):
        with pytest.raises(MMMoEError) as caught:
            program_of()
        assert said in str(caught.value)
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert "ran" not in capsys.readouterr().out


def test_empty_cells_are_counted_for_the_record(folder):
    values = counts(40, 6)
    values[[1, 4]] = 0
    write_h5ad(folder / "human.h5ad", values, obs={"cell_type": ["x", "y"] * 20})
    argv = [*RECIPE, "--data_dir", str(folder), "--dataset_options", '{"label": "cell_type"}']
    source = check(RecipeParser().namespace(argv), argv)
    assert isinstance(source, Unlabelled)
    assert source.left_out == {"human: all-zero": 2}


def test_prepared_cells_name_what_is_in_quarantine(folder, tmp_path, capsys):
    values = counts(40, 6)
    values[[1, 4]] = 0
    write_h5ad(folder / "human.h5ad", values)
    output = tmp_path / "out"
    assert prepare_data.main(["cells", "--source", str(folder), "--output", str(output)]) == 0
    lines = [json.loads(line) for line in (output / "quarantine.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["human/human:c1", "human/human:c4"]
    assert {line["why"] for line in lines} == {"all-zero"}
    assert "human: 38 cells of 6 genes; not used: 2 all-zero" in capsys.readouterr().out


def test_genes_of_another_length_or_order_are_no_resume(tmp_path):
    stored = config()
    (tmp_path / "config.json").write_text(json.dumps(stored.to_dict()))
    check_same_model(tmp_path, stored.to_dict())
    human, mouse = stored.genes.values()
    for genes in (human[:-1], human[::-1]):
        other = config(genes={"human": genes, "mouse": mouse})
        with pytest.raises(CheckpointError, match=r"another model: genes was .*, is "):
            check_same_model(tmp_path, other.to_dict())


def test_genes_in_another_order_than_the_vocabulary_are_moved(folder):
    from mm_moe.data.sets.cells import CellsData

    words = CellsData(str(folder)).vocabulary.to_dict()
    values = counts(40, 6)
    genes = [f"g{n}" for n in (5, 0, 1, 2, 3, 4)]
    write_h5ad(folder / "human.h5ad", values, genes=genes)
    source = CellsData(str(folder), vocabulary=words)
    cell = source.files[0].read(np.arange(40))
    dense = scipy.sparse.csr_matrix((cell.val, cell.col, cell.crow), shape=(40, 6)).toarray()
    assert np.array_equal(dense, np.roll(values, -1, axis=1))
    write_h5ad(folder / "human.h5ad", values[:, :5], genes=genes[:5])
    with pytest.raises(DataError, match=r"1 are missing \(g4\)"):
        CellsData(str(folder), vocabulary=words)
