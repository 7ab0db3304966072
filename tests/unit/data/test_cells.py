"""The data set `cells`: files, checks, splits, vocabularies, rows that keep their cell."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip("anndata", reason="pip install -e '.[single_cell]'")

from mm_moe.data.cells.rows import CellProcessor, Rows, densify, log_normalise
from mm_moe.data.collate import Collator
from mm_moe.data.sets.cells import CellsData
from mm_moe.data.streaming import SampleStream
from mm_moe.errors import ConfigError, DataError
from tests.cell_files import counts, two_species, write_h5ad

ALL_TRAIN = (1.0, 0.0, 0.0)


def dense(source, sample):
    (species, cell), *_ = sample.payload.items()
    genes = len(source.vocabulary.genes[species])
    return CellProcessor(genes, form="dense")([cell])["values"][0].numpy()


def cells(source, split="train", **options):
    return list(SampleStream(source, split=split, batch_size=1, epochs=1, **options))


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_each_row_is_the_cell_of_its_name(tmp_path, form):
    values = counts(100, 7)
    write_h5ad(
        tmp_path / "human_a.h5ad", values, form=form, obs={"n": [f"{n}" for n in range(100)]}
    )
    source = CellsData(str(tmp_path), conditions=["n"])
    found = {s.id: s for split in source.splits() for s in cells(source, split)}
    assert len(found) == 100
    for n in range(100):
        sample = found[f"human/human_a:c{n}"]
        assert dense(source, sample).tolist() == values[n].tolist()
        cell = sample.payload["human"]
        assert cell.library == values[n].sum()
        if cell.conditions[0]:  # the label of a training cell is its own name
            assert source.vocabulary.conditions["n"][cell.conditions[0] - 1] == f"{n}"


def test_shuffled_training_keeps_rows_with_their_cells(tmp_path):
    values = counts(200, 5)
    write_h5ad(tmp_path / "human.h5ad", values)
    source = CellsData(str(tmp_path), shares=ALL_TRAIN)
    stream = SampleStream(source, split="train", batch_size=1, shuffle_buffer=50)
    samples = [sample for sample, _ in zip(stream, range(400), strict=False)]
    names = [int(sample.id.rpartition("c")[2]) for sample in samples]
    assert sorted(names[:200]) == sorted(names[200:]) == list(range(200))
    assert names[:200] != names[200:] != sorted(names[200:])
    for name, sample in zip(names, samples, strict=True):
        assert dense(source, sample).tolist() == values[name].tolist()
    assert [s.epoch for s in samples] == [0] * 200 + [1] * 200


def test_batch_of_two_species_by_hand(tmp_path):
    write_h5ad(
        tmp_path / "human.h5ad", np.array([[0, 2, 0], [1, 0, 3.0]]), obs={"kind": ["a", "b"]}
    )
    write_h5ad(tmp_path / "mouse.h5ad", np.array([[4.0, 0]]))
    source = CellsData(str(tmp_path), conditions=["species", "kind"], shares=ALL_TRAIN)
    assert source.vocabulary.conditions == {"species": ("human", "mouse"), "kind": ("a", "b")}
    collate = Collator(
        modalities=source.modalities,
        processors={m: CellProcessor(len(g)) for m, g in source.vocabulary.genes.items()},
        problem_type="none",
        num_labels=0,
    )
    batch = collate(cells(source))
    assert batch.present.tolist() == [[True, False], [True, False], [False, True]]
    human = batch.inputs["human"]
    assert human["crow"].tolist() == [0, 1, 3]
    assert human["col"].tolist() == [1, 0, 2]
    assert human["val"].tolist() == [2, 1, 3]
    assert human["library"].tolist() == [2, 4]
    assert human["conditions"].tolist() == [[1, 1], [1, 2]]
    assert batch.inputs["mouse"]["conditions"].tolist() == [[2, 0]]  # no kind: unknown
    matrix = densify(*(human[name] for name in ("crow", "col", "val")), num_genes=3)
    assert matrix.tolist() == [[0, 2, 0], [1, 0, 3]]


@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_counts_are_whole_numbers_which_mixed_precision_leaves_alone(tmp_path, form):
    write_h5ad(tmp_path / "human.h5ad", np.array([[257.0, 0, 70001.0]]))
    source = CellsData(str(tmp_path), shares=ALL_TRAIN)
    processor = CellProcessor(3, form=form, counts=True)
    found = processor([sample.payload["human"] for sample in cells(source)])
    values = found["val"] if form == "sparse" else found["values"]
    assert not values.is_floating_point()
    assert values[values > 0].tolist() == [257, 70001]
    assert found["library"].tolist() == [70258]
    assert not found["library"].is_floating_point()
    assert torch.tensor(257.0).bfloat16().item() == 256  # what would have come of it


def test_normalised_rows_sum_to_ten_thousand():
    values = torch.tensor([[1.0, 3, 0], [0, 0, 0], [5, 0, 0]])
    found = log_normalise(values)
    assert torch.expm1(found).sum(-1).tolist() == pytest.approx([1e4, 0, 1e4], rel=1e-5)
    assert found[0, 1].item() == pytest.approx(np.log1p(7500))


def test_rows_by_hand():
    rows = Rows.of_dense(np.array([[0, 1, 2], [0, 0, 0], [3, 0, 4]], dtype=np.float32))
    assert rows.crow.tolist() == [0, 2, 2, 4]
    assert rows.sums().tolist() == [3, 0, 7]
    assert rows.take(np.array([2, 0])).val.tolist() == [3, 4, 1, 2]
    moved = rows.with_genes(np.array([1, -1, 0]))  # gene 1 is left out, 0 and 2 change places
    assert (moved.crow.tolist(), moved.col.tolist()) == ([0, 1, 1, 3], [0, 1, 0])
    assert moved.val.tolist() == [2, 3, 4]
    twice = Rows.joined([rows, rows])
    assert twice.crow.tolist() == [0, 2, 2, 4, 6, 6, 8]


def test_donors_stay_in_one_split_and_columns_name_splits(tmp_path):
    folder = two_species(tmp_path)
    source = CellsData(str(folder), split_by="donor", group="donor", shares=(0.4, 0.3, 0.3))
    groups = {split: {s.group for s in source.index(split)} for split in source.splits()}
    assert sum(map(len, groups.values())) == 10 == len(set().union(*groups.values()))
    obs = {"fold": ["train", "val", "test", "train"]}
    write_h5ad(tmp_path / "named.h5ad", counts(4, 3), obs=obs)
    named = CellsData(str(tmp_path), files={"human": "named.h5ad"}, split_column="fold")
    assert {split: named.size(split) for split in named.splits()} == {
        "train": 2,
        "validation": 1,
        "test": 1,
    }
    write_h5ad(tmp_path / "named.h5ad", counts(2, 3), obs={"fold": ["train", "x9"]})
    with pytest.raises(DataError, match="'x9'"):
        CellsData(str(tmp_path), files={"human": "named.h5ad"}, split_column="fold")


def test_labels_of_training_alone_have_codes(tmp_path):
    write_h5ad(tmp_path / "a.h5ad", counts(4, 3), obs={"donor": ["b", "a", "b", None]})
    write_h5ad(tmp_path / "b.h5ad", counts(3, 3), obs={"donor": ["a", "z", "z"]})
    files = {"human": {"train": "a.h5ad", "test": "b.h5ad"}}
    source = CellsData(str(tmp_path), files=files, conditions=["donor"])
    assert source.vocabulary.conditions == {"donor": ("a", "b")}
    of = {
        split: [s.payload["human"].conditions for s in cells(source, split)]
        for split in source.splits()
    }
    assert of == {"train": [(2,), (1,), (2,), (0,)], "test": [(1,), (0,), (0,)]}
    assert source.unseen["test"] == {"donor": {"z": 2}}
    stored = source.vocabulary.to_dict()
    later = CellsData(str(tmp_path), files={"human": {"train": "b.h5ad"}}, vocabulary=stored)
    assert [s.payload["human"].conditions for s in cells(later)] == [(1,), (0,), (0,)]


def test_gene_lists_are_brought_into_order_or_refused(tmp_path):
    write_h5ad(tmp_path / "human_a.h5ad", np.array([[1, 2, 3.0]]), genes=["x", "y", "z"])
    write_h5ad(tmp_path / "human_b.h5ad", np.array([[7, 8, 9.0]]), genes=["z", "x", "y"])
    source = CellsData(str(tmp_path), shares=ALL_TRAIN)
    assert source.moved == {"human": 3}
    assert [dense(source, s).tolist() for s in cells(source)] == [[1, 2, 3], [8, 9, 7]]
    write_h5ad(tmp_path / "human_b.h5ad", np.array([[7, 8.0]]), genes=["z", "new"])
    with pytest.raises(DataError, match=r"2 genes where 3 are expected: 2 are missing \(x, y\)"):
        CellsData(str(tmp_path))
    common = CellsData(str(tmp_path), genes="common", shares=ALL_TRAIN)
    assert common.vocabulary.genes == {"human": ("z",)}
    given = {"genes": {"human": ["y", "z"]}, "conditions": {}}
    filled = CellsData(str(tmp_path), genes="common", vocabulary=given, shares=ALL_TRAIN)
    assert [dense(filled, s).tolist() for s in cells(filled)] == [[2, 3], [0, 7]]


@pytest.mark.parametrize(("value", "shown"), [(-2, "-2"), (1.5, "1.5"), (float("nan"), "nan")])
def test_what_is_no_count_is_named_with_its_place(tmp_path, value, shown):
    values = counts(5, 3)
    values[3, 1] = value
    write_h5ad(tmp_path / "human.h5ad", values)
    with pytest.raises(DataError, match=rf"'c3' \(row 3\) has {shown} for gene 'g1'; counts are"):
        CellsData(str(tmp_path))
    if value == 1.5:
        assert CellsData(str(tmp_path), values="normalised").size_of("train")
    else:
        with pytest.raises(DataError, match="finite and not negative"):
            CellsData(str(tmp_path), values="normalised")


def test_empty_cells_are_put_aside_and_counted(tmp_path, caplog):
    values = counts(6, 3)
    values[[1, 4]] = 0
    write_h5ad(tmp_path / "human.h5ad", values)
    source = CellsData(str(tmp_path), shares=ALL_TRAIN)
    assert source.dropped == {"human": {"all-zero": 2}}
    assert [s.id[-2:] for s in cells(source)] == ["c0", "c2", "c3", "c5"]
    assert "2 cells are not used: all-zero" in caplog.text
    write_h5ad(tmp_path / "human.h5ad", np.zeros((3, 2)))
    with pytest.raises(DataError, match="no cell left"):
        CellsData(str(tmp_path))


def mixed(folder, *, species):
    values = np.array([[9, 1, 0, 0], [0, 0, 5, 5], [3, 0, 3, 0.0]])
    genes = ["hg19_A", "hg19_B", "mm10_a", "mm10_b"]
    obs = {"species": ["hg19", "mm10", "doublet"]} if species else {}
    return write_h5ad(folder / "mix.h5ad", values, genes=genes, obs=obs)


@pytest.mark.parametrize("species", [True, False])
def test_a_mixed_file_is_refused_or_parted(tmp_path, species):
    mixed(tmp_path, species=species)
    with pytest.raises(DataError, match="of several species") as told:
        CellsData(str(tmp_path), files={"human": "mix.h5ad"})
    assert ("doublet, hg19, mm10" in str(told.value)) == species
    entry = {"path": "mix.h5ad", "genes": "hg19_"}
    other = {"path": "mix.h5ad", "genes": "mm10_"}
    if species:
        entry, other = entry | {"only": {"species": "hg19"}}, other | {"only": {"species": "mm10"}}
    source = CellsData(str(tmp_path), files={"human": entry, "mouse": other}, shares=ALL_TRAIN)
    assert source.vocabulary.genes == {"human": ("A", "B"), "mouse": ("a", "b")}
    assert {s.id: dense(source, s).tolist() for s in cells(source)} == {
        "human/mix:c0": [9, 1],
        "mouse/mix:c1": [5, 5],
    }
    assert sum(source.dropped["human"].values()) == 2


def test_layers(tmp_path):
    low, high = counts(4, 3, seed=1), counts(4, 3, seed=2)
    write_h5ad(tmp_path / "human.h5ad", np.log1p(low), layers={"counts": high})
    with pytest.raises(DataError, match='"layer"'):
        CellsData(str(tmp_path))
    source = CellsData(str(tmp_path), layer="counts", shares=ALL_TRAIN)
    assert [dense(source, s).tolist() for s in cells(source)] == high.tolist()
    with pytest.raises(DataError, match="layers that it has beside X: counts"):
        CellsData(str(tmp_path), layer="raw")


def test_a_cut_file_is_told(tmp_path):
    path = write_h5ad(tmp_path / "human.h5ad", counts(300, 40))
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(DataError, match="cut"):
        CellsData(str(tmp_path))
    path.write_bytes(b"no hdf5")
    with pytest.raises(DataError, match="get the file again"):
        CellsData(str(tmp_path))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sampler": "uniforn"}, "did you mean uniform"),
        ({"run": 0}, "whole number from 1"),
        ({"values": "counted"}, "counts or normalised"),
        ({"shares": (0.5, 0.1, 0.1)}, "sum to 1"),
        ({"split_by": "a", "split_column": "b"}, "not both"),
        ({"files": {"human": {"path": "human.h5ad", "gens": "x"}}}, "did you mean genes"),
        ({"files": {}}, "must be an object"),
        ({"vocabulary": {"genes": {}}}, "conditions"),
    ],
)
def test_options_that_cannot_work(tmp_path, options, words):
    two_species(tmp_path, cells=4)
    with pytest.raises(ConfigError, match=words):
        CellsData(str(tmp_path), **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"files": {"human": "nowhere.h5ad"}}, "there is no"),
        ({"files": {"human": "x*.h5ad"}}, "no file in"),
        ({"conditions": ["assay"]}, "'assay'"),
        ({"label": "assay"}, "'assay'"),
        ({"split_by": "assay"}, "it has: donor, cell_type"),
        ({"vocabulary": "nowhere.json"}, "FileNotFoundError"),
        ({"files": {"human": {"path": "human.h5ad", "genes": "hg38_"}}}, "begins with 'hg38_'"),
    ],
)
def test_data_that_is_not_there(tmp_path, options, words):
    two_species(tmp_path, cells=10)
    with pytest.raises(DataError, match=words):
        CellsData(str(tmp_path), **options)


@pytest.mark.parametrize("sampler", ["uniform", "proportional", "alternating", "longest"])
@pytest.mark.parametrize("memory_mib", [0, 64])
def test_any_number_of_processes_and_a_resume_see_one_order(tmp_path, sampler, memory_mib):
    two_species(tmp_path)
    source = CellsData(str(tmp_path), sampler=sampler, run=3, memory_mib=memory_mib)

    def batches(world, start=0, count=6):
        """The first global batches of 8 cells, put together from all ranks."""
        parts = []
        for rank in range(world):
            stream = SampleStream(
                source,
                split="train",
                batch_size=8 // world,
                rank=rank,
                world_size=world,
                shuffle_buffer=16,
                start=start,
            )
            own = [s for s, _ in zip(stream, range(count * 8 // world), strict=False)]
            parts.append([own[n : n + 8 // world] for n in range(0, len(own), 8 // world)])
        return [[s for own in together for s in own] for together in zip(*parts, strict=True)]

    one = batches(1)
    assert batches(2) == batches(4) == one
    assert batches(2, start=16, count=4) == one[2:]
    assert [s.epoch for b in batches(4) for s in b] == [s.epoch for b in one for s in b]
    assert len({s.id for b in one for s in b}) > 20


def test_the_last_part_of_an_evaluation_is_kept(tmp_path):
    two_species(tmp_path, cells=14)  # 14 and 7
    source = CellsData(str(tmp_path), shares=ALL_TRAIN)
    sizes = []
    for rank in range(2):
        stream = SampleStream(
            source, split="train", batch_size=4, rank=rank, world_size=2, epochs=1
        )
        sizes.append(len(list(stream)))
    assert sizes == [12, 9]  # 8 + 8 + 5: the first rank takes 4 of the last five


def test_memory_and_disk_give_the_same_cells(tmp_path):
    two_species(tmp_path)
    kept, read = (CellsData(str(tmp_path), memory_mib=m) for m in (64, 0))
    assert [file.keep for file in kept.files] == [True, True]
    assert [file.keep for file in read.files] == [False, False]
    for options in ({}, {"shuffle_buffer": 8}):
        assert cells(kept, **options) == cells(read, **options)


def real_files():
    beside = Path(__file__).parents[4] / "shared" / "data"
    folder = Path(os.environ.get("MM_MOE_DATA", beside)) / "single_cell"
    if not folder.is_dir():
        pytest.skip(f"no data in {folder}; set MM_MOE_DATA to the folder of the data sets")
    return folder


def test_real_cells_of_two_species():
    mix = "human_mouse_mixture_1k.h5ad"
    files = {
        "human": {"path": mix, "genes": "hg19_", "only": {"species": "hg19"}},
        "mouse": {"path": mix, "genes": "mm10_", "only": {"species": "mm10"}},
    }
    source = CellsData(str(real_files()), files=files)
    assert source.dropped["human"] == {"species is doublet": 20, "species is mm10": 532}
    assert sum(map(source.size, source.splits())) == 485 + 532
    assert {s: len(g) for s, g in source.vocabulary.genes.items()} == {
        "human": 16_121,
        "mouse": 13_862,
    }
    for sample in cells(source, "test")[:40]:
        (cell,) = sample.payload.values()
        values = np.frombuffer(cell.val, "<f4")
        assert (values > 0).all()
        assert (values == values.round()).all()
        assert values.sum() == cell.library > 1000


def test_real_bone_marrow_in_training_order():
    folder = real_files()
    files = {"human": "human_bone_marrow.h5ad", "mouse": "mouse_bone_marrow.h5ad"}
    source = CellsData(str(folder), files=files, conditions=["species", "tissue"], run=16)
    assert source.dropped == {"human": {}, "mouse": {}}
    assert {s: len(g) for s, g in source.vocabulary.genes.items()} == {
        "human": 16_106,
        "mouse": 3451,
    }
    stream = SampleStream(source, split="train", batch_size=16, shuffle_buffer=512)
    samples = [s for s, _ in zip(stream, range(160), strict=False)]
    runs = [{*s.payload} for s in samples]
    assert all(runs[n] == runs[n - n % 16] for n in range(160))
    assert {name for run in runs for name in run} == {"human", "mouse"}


def test_loader_workers_open_the_file_anew(tmp_path):
    write_h5ad(tmp_path / "human.h5ad", counts(200, 5))
    source = CellsData(str(tmp_path), shares=ALL_TRAIN, memory_mib=0)

    def drawn(workers):
        stream = SampleStream(source, split="train", batch_size=16, shuffle_buffer=64)
        loader = DataLoader(stream, 16, collate_fn=list, num_workers=workers)
        return [batch for batch, _ in zip(loader, range(20), strict=False)]

    alone = drawn(0)  # this process has the file open when the others begin
    assert drawn(2) == alone
