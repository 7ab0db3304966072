"""Data sets of patients: splits by patient, statistics of training, no label among the inputs."""

import itertools

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mm_moe.data.events import read_events
from mm_moe.data.sets.patients import check_apart, fold_splits, folds
from mm_moe.data.sets.physionet2012 import Physionet2012Data
from mm_moe.data.sets.tcga_luad import OUTCOMES, SMOKING, TcgaLuadData
from mm_moe.data.standardise import CATEGORICAL, NUMERIC, TableEncoder, moments, standardised
from mm_moe.errors import ConfigError, DataError
from tests import patient_layouts


def test_columns_are_fitted_on_training_rows_and_gaps_stay():
    columns = {
        "age": np.array([1.0, 3.0, np.nan, 7.0]),
        "unit": np.array(["b", "a", None, "c"], object),
    }
    encoder = TableEncoder({"age": NUMERIC, "unit": CATEGORICAL})
    found = encoder.fit(columns, np.array([True, True, True, False])).encode(columns)
    # training ages 1 and 3: mean 2, spread 1; "c" is no level of training
    np.testing.assert_array_equal(found, [[-1, 0, 1], [1, 1, 0], [np.nan] * 3, [5, 0, 0]])
    assert encoder.names == ["age", "unit=a", "unit=b"]
    assert encoder.unseen == {"unit": 1}


def test_constants_and_empty_columns_do_not_divide_by_zero():
    assert moments(np.array([5.0, 5.0])) == (5.0, 1.0)
    assert moments(np.array([np.nan])) == (0.0, 1.0)
    values = np.array([[2.0, np.nan], [4.0, np.nan], [9.0, 1.0]])
    found = standardised(values, np.array([True, True, False]))
    np.testing.assert_array_equal(found, [[-1, np.nan], [1, np.nan], [6, 1]])


def test_a_column_of_ids_is_no_category():
    columns = {"id": np.array([str(n) for n in range(300)], object)}
    with pytest.raises(DataError, match="300 levels"):
        TableEncoder({"id": CATEGORICAL}).fit(columns, np.ones(300, bool))


def test_folds_are_stratified_and_cover_every_patient_once():
    names = [f"p{n}" for n in range(50)]
    labels = {name: int(n < 10) for n, name in enumerate(names)}
    fold_of = folds(names, labels, count=5, dataset="d", seed=0)
    tests = [fold_splits(fold_of, fold=fold, count=5)["test"] for fold in range(5)]
    assert sorted(itertools.chain(*tests)) == sorted(names)
    assert [sum(labels[name] for name in test) for test in tests] == [2] * 5
    assert folds(names[::-1], labels, count=5, dataset="d", seed=0) == fold_of
    assert folds(names, labels, count=5, dataset="d", seed=1) != fold_of


def test_a_patient_in_two_splits_is_refused_without_a_name():
    with pytest.raises(DataError, match="1 patients are in 'train' and in 'test'") as error:
        check_apart({"train": ["anna", "bob"], "test": ["bob"]}, name="d")
    assert "bob" not in str(error.value)
    with pytest.raises(DataError, match="'train' twice"):
        check_apart({"train": ["anna", "anna"]}, name="d")


def samples_of(source):
    return {split: list(source.index(split)) for split in source.splits()}


def test_tcga_has_labels_gaps_and_pseudonyms(tmp_path):
    source = TcgaLuadData(str(patient_layouts.tcga_luad(tmp_path)))
    found = list(itertools.chain(*samples_of(source).values()))
    assert len(found) == len({sample.id for sample in found}) == 40
    assert sum(sample.label for sample in found) == 10
    assert not any("TCGA" in sample.id for sample in found)
    lacking = {m: sum(m not in s.payload for s in found) for m in source.modalities}
    assert lacking == {"gene": 8, "mirna": 0, "protein": 14, "mutation": 0, "clinical": 0}


def test_tcga_standardises_over_the_training_patients(tmp_path):
    source = TcgaLuadData(str(patient_layouts.tcga_luad(tmp_path)), fold=2)
    rows = [s.payload["gene"].array() for s in source.index("train") if "gene" in s.payload]
    np.testing.assert_allclose(np.mean(rows, 0), 0, atol=1e-5)
    np.testing.assert_allclose(np.std(rows, 0), 1, atol=1e-5)
    other = [s.payload["gene"].array() for s in source.index("test") if "gene" in s.payload]
    assert abs(np.mean(other)) > 1e-3


def test_tcga_takes_what_tells_the_label_from_the_inputs(tmp_path):
    folder = str(patient_layouts.tcga_luad(tmp_path))
    never, stage = TcgaLuadData(folder), TcgaLuadData(folder, label="stage")
    assert SMOKING in never.leaks
    assert SMOKING not in stage.leaks
    assert set(OUTCOMES) <= set(never.leaks) & set(stage.leaks)
    # inputs with a level or a number: gender 2, stage 4, and numbers; smoking has two levels
    [stages], [smoking] = (
        never.array_shapes["clinical"]["shape"],
        stage.array_shapes["clinical"]["shape"],
    )
    assert (stages, smoking) == (2 + 4 + 6, 2 + 2 + 7)
    assert [s.label for s in stage.index("test")].count(0) == 2


def test_tcga_survival_is_days_and_whether_they_died(tmp_path):
    folder = patient_layouts.tcga_luad(tmp_path)
    source = TcgaLuadData(str(folder), label="survival")
    labels = sorted(s.label for split in source.splits() for s in source.index(split))
    # patient n: dead after 10 n days where n is odd, else seen last after 20 n; 0 has no follow-up
    expected = [(10.0 * n, 1.0) if n % 2 else (20.0 * n, 0.0) for n in range(1, 40)]
    assert labels == sorted(expected)
    assert source.label_names == ()
    assert source.left_out == {"without a label": 1}
    test = [s.label[1] for s in source.index("test")]
    assert sum(test) == 4  # folds are stratified by the event


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"label": "stages"}, "did you mean stage"),
        ({"label": ["stage"]}, "did you mean stage"),
        ({"fold": 5}, "0 to 4"),
        ({"fold": True}, "0 to 4"),
        ({"seed": "a"}, "whole number"),
    ],
)
def test_tcga_refuses_wrong_options(tmp_path, options, words):
    with pytest.raises(ConfigError, match=words):
        TcgaLuadData(str(patient_layouts.tcga_luad(tmp_path)), **options)


def test_tcga_refuses_wrong_files(tmp_path):
    folder = patient_layouts.tcga_luad(tmp_path)
    genes = pq.read_table(folder / "gene_expression.parquet")
    pq.write_table(genes.rename_columns(["who", *genes.column_names[1:]]), folder / "mirna.parquet")
    with pytest.raises(DataError, match=r"mirna.parquet has no column 'patient'"):
        TcgaLuadData(str(folder)).size("train")
    (folder / "mirna.parquet").unlink()
    with pytest.raises(DataError, match=r"mirna.parquet"):
        TcgaLuadData(str(folder))


def test_tcga_refuses_a_column_twice(tmp_path):
    folder = patient_layouts.tcga_luad(tmp_path)
    clinical = folder / "clinical.csv"
    lines = clinical.read_text().splitlines()
    clinical.write_text("\n".join(f"{line},{line.split(',')[0]}" for line in lines))
    with pytest.raises(DataError, match=r"clinical.csv has a column twice"):
        TcgaLuadData(str(folder)).size("train")


PATIENTS = [f"TCGA-00-{n:04d}" for n in range(40)]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"patient": PATIENTS, "g": ["x"] * 40}, "numbers alone"),
        ({"patient": PATIENTS}, "numbers alone"),
        ({"patient": PATIENTS, "g": [np.nan] * 40}, "24 training patients has 'gene'"),
        ({"patient": PATIENTS, "g": [np.inf] * 40}, "infinite"),
        ({"patient": PATIENTS, "g": [1e300] * 40}, "infinite or too large"),
        ({"patient": [[n] for n in range(40)], "g": [1.0] * 40}, "must hold names"),
        ({"patient": list(range(40)), "g": [1.0] * 40}, "are its ids those of the labels"),
    ],
)
def test_tcga_refuses_a_table_without_numbers_of_its_patients(tmp_path, columns, words):
    folder = patient_layouts.tcga_luad(tmp_path)
    pq.write_table(pa.table(columns), folder / "gene_expression.parquet")
    with pytest.raises(DataError, match=words):
        TcgaLuadData(str(folder)).size("train")


def test_tcga_takes_no_other_cell_for_a_label(tmp_path):
    cells = {SMOKING: ["7"] * 10 + ["1", "3"] * 15, "death_days_to": ["inf"] * 40}
    folder = str(patient_layouts.tcga_luad(tmp_path, **cells))
    assert TcgaLuadData(folder).left_out == {"without a label": 10}
    # the 20 dead have no day of death, and patient 0 was never seen again
    assert TcgaLuadData(folder, label="survival").left_out == {"without a label": 21}
    unlabelled = patient_layouts.tcga_luad(tmp_path / "none", **{SMOKING: ["[Unknown]"] * 40})
    with pytest.raises(DataError, match="no patient of the training split has a label"):
        TcgaLuadData(str(unlabelled)).size("train")


def test_physionet_reads_events_and_leaves_out_what_was_not_recorded(tmp_path):
    source = Physionet2012Data(str(patient_layouts.physionet2012(tmp_path)))
    found = samples_of(source)
    assert len(found["train"]) + len(found["validation"]) == 20
    assert len(found["test"]) == 20
    first = found["test"][1]  # stay 5001: no weight, HR 61 at half an hour, pH at one and a half
    events = read_events(first.payload["series"])
    np.testing.assert_array_equal(events, np.float32([[0.5, 0, 61], [1.5, 2, 7.25]]))
    assert source.sequences["series"]["events"]["variables"] == ["HR", "Weight", "pH"]
    assert [s.label for s in found["test"]].count(1) == 4
    height = [s.payload["static"].array()[-2] for s in found["test"]]
    assert np.isnan(height).tolist() == [True, False] * 10  # -1 is no height


def test_physionet_parts_its_series(tmp_path):
    folder = str(patient_layouts.physionet2012(tmp_path))
    source = Physionet2012Data(folder, split_series=True, label="length_of_stay")
    found = list(itertools.chain(*samples_of(source).values()))
    assert source.modalities == ("static", "vitals", "labs")
    assert sum("labs" not in s.payload for s in found) == 10
    assert sum(s.label is None for s in found) == 6  # -1 days


def test_physionet_refuses_events_after_the_prediction(tmp_path):
    late = {"minute": [2881] + [0] * 54}
    source = Physionet2012Data(str(patient_layouts.physionet2012(tmp_path, **late)))
    with pytest.raises(DataError, match="1 events after hour 48"):
        source.size("train")


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ({"minute": [float("nan")] * 55}, "infinite or too large"),
        ({"minute": ["00:30"] * 55}, "'minute' holds something else than numbers"),
        ({"value": [1e300] * 55}, "infinite or too large"),
        ({"value": [-1.0] * 55}, "training patients has 'series'"),
        ({"parameter": [None, *["HR"] * 54]}, "without a stay, a time or a parameter"),
        ({"parameter": list(range(55))}, "must hold names"),
    ],
)
def test_physionet_refuses_events_that_are_none(tmp_path, events, words):
    source = Physionet2012Data(str(patient_layouts.physionet2012(tmp_path, **events)))
    with pytest.raises(DataError, match=words):
        source.size("train")


@pytest.mark.parametrize(
    ("column", "cells", "words"),
    [
        ("In-hospital_death", [5] * 20, "neither 0 nor 1"),
        ("In-hospital_death", ["no"] * 20, "something else than numbers"),
        ("record_id", [None, *range(1001, 1020)], "rows without record_id"),
        ("record_id", [1e300, *range(1001, 1020)], "rows without record_id"),
        ("Age", [np.inf] * 20, "infinite or too large values"),
        ("Age", [1e300] * 20, "infinite or too large values"),
    ],
)
def test_physionet_refuses_wrong_cells(tmp_path, column, cells, words):
    folder = patient_layouts.physionet2012(tmp_path)
    table = pq.read_table(folder / "patients_a.parquet")
    place = table.schema.get_field_index(column)
    pq.write_table(table.set_column(place, column, [cells]), folder / "patients_a.parquet")
    with pytest.raises(DataError, match=words):
        Physionet2012Data(str(folder)).size("train")


@pytest.mark.parametrize("options", [{"label": None}, {"seed": "a"}, {"split_series": "no"}])
def test_physionet_refuses_wrong_options(tmp_path, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        Physionet2012Data(str(patient_layouts.physionet2012(tmp_path)), **options)


def test_random_access_is_that_of_the_stream(tmp_path):
    source = TcgaLuadData(str(patient_layouts.tcga_luad(tmp_path)))
    train = list(source.index("train"))
    assert source.samples_at("train", [3, 0]) == [train[3], train[0]]
