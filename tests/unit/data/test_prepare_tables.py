"""Tables of patients by a schema file: what is read, what is refused, what goes into quarantine."""

import copy
import json

import numpy as np
import pytest

from launch import prepare_data
from mm_moe.data.events import read_events
from mm_moe.data.prepare.tables import TablesRaw
from mm_moe.data.sets.prepared import TablesData
from mm_moe.errors import DataError
from tests import patient_layouts
from tests.patient_layouts import SCHEMA


def changed(**places):
    """The schema with other entries: {"modalities.labs.kind": "text"}; None takes one away."""
    schema = copy.deepcopy(SCHEMA)
    for place, value in places.items():
        *path, last = place.split("__")
        inner = schema
        for key in path:
            inner = inner[key]
        if value is None:
            inner.pop(last)
        else:
            inner[last] = value
    return schema


def prepared(tmp_path, *flags, **layout):
    raw = patient_layouts.tables(tmp_path / "raw", **layout)
    argv = ["tables", "--source", str(raw), "--output", str(tmp_path / "out"), *flags]
    assert prepare_data.main(argv) == 0
    return TablesData(str(tmp_path / "out"))


def test_every_kind_of_table_reaches_its_sample(tmp_path):
    source = prepared(tmp_path)
    assert {split: source.size(split) for split in source.splits()} == {
        "train": 16,
        "validation": 4,
        "test": 4,
    }
    rows = list(source.index("train"))
    samples = [source.to_sample(row) for row in source.stream("train")]
    assert [s.label for s in rows][:6] == [1, 0, 0, 0, 0, 1]
    assert rows[0].group == rows[1].group != rows[2].group
    assert not any("anna" in s.id or "s0" in s.id for s in samples)
    lacking = {m: sum(m not in s.payload for s in samples) for m in source.modalities}
    # stays 0 to 7 and 12 to 19: 0, 3, 6, 12, 15, 18 have no labs, 0, 4, 12, 16 no scan
    assert lacking == {"static": 0, "labs": 6, "vitals": 0, "notes": 0, "scan": 4}
    second = samples[1].payload
    np.testing.assert_allclose(read_events(second["labs"]), [[1.5, 0, 7.01]], rtol=1e-6)
    # two measurements at hour 0, one at 12: the pressure of that line is empty
    np.testing.assert_array_equal(
        read_events(second["vitals"]), [[0, 0, 61], [0, 1, 80], [12, 0, 61]]
    )
    assert second["notes"] == "note 1"
    assert second["scan"].shape == (1, 2, 2, 2)
    assert source.array_shapes["scan"]["form"] == "volume"
    assert source.sequences["vitals"]["events"]["hours"] == 24.0


def test_statistics_are_of_training_and_gaps_stay(tmp_path):
    source = prepared(tmp_path)
    samples = [source.to_sample(row) for row in source.stream("train")]
    static = np.stack([s.payload["static"].array() for s in samples])
    assert np.isnan(static[:, 0]).sum() == 1  # stay 3's age
    np.testing.assert_allclose(np.nanmean(static[:, 0]), 0, atol=1e-6)
    np.testing.assert_allclose(np.nanstd(static[:, 0]), 1, atol=1e-6)
    assert source.array_shapes["static"] == {"shape": [3], "scale": 1.0, "form": "table"}
    info = json.loads((tmp_path / "out" / "dataset_info.json").read_text())
    assert info["findings"]["columns that are never inputs"] == {"score": "given at discharge"}


REFUSED = {
    "modality_kind": ({"modalities__labs__kind": "event"}, "did you mean events"),
    "missing_key": ({"modalities__labs__time": None}, "modality 'labs' lacks time"),
    "unknown_key": ({"modalities__labs__tiem": "x"}, "did you mean time"),
    "leak": ({"modalities__static__columns": {"score": "numeric"}}, "leaks says must not be one"),
    "column_kind": ({"modalities__static__columns": {"age": "number"}}, "numeric"),
    "classes": ({"label__classes": ["no", "yes", "so"]}, "binary has two"),
    "no_time": ({"label__kind": "survival", "label__classes": None}, "time is needed for"),
    "shares": ({"split": {"shares": {"train": 0.7, "test": 0.7}}}, r"add up to 1\.4"),
    "both": ({"split": {"shares": {"train": 1.0}, "column": "part"}}, "one of column and shares"),
    "no_file": ({"modalities__labs__file": "lab.csv"}, "there is no lab.csv"),
    "no_column": (
        {"modalities__labs__value": "results"},
        "no column 'results'; it has: stay, hour",
    ),
    "no_label": ({"label__column": "dead"}, "no column 'dead'"),
    "late": ({"prediction_time": 6}, "24 values after the prediction time"),
    "hours_word": ({"prediction_time": "soon"}, "give a number of hours"),
    "hours_nan": ({"prediction_time": float("nan")}, "give a number of hours"),
    "hours_column": ({"prediction_time": {"colum": "hour"}}, "lacks column"),
    "leaks": ({"leaks": "score"}, "leaks must be a list"),
    "seed": ({"split": {"shares": {"train": 1.0}, "seed": "x"}}, "whole number"),
    "file": ({"modalities__labs__file": 3}, "must be a name, not 3"),
    "column": ({"modalities__notes__column": ["text"]}, "must be a name"),
    "kind": ({"modalities__labs__kind": ["events"]}, "did you mean events"),
    "no_columns": ({"modalities__static__columns": {}}, "at least one column"),
    "twice": ({"modalities__vitals__columns": ["hr", "hr"]}, "different columns"),
    "taken": ({"modalities__label": SCHEMA["modalities"]["static"]}, "none of id, group, label"),
    "id_input": ({"modalities__static__columns": {"stay": "categorical"}}, "names the row"),
    "label_input": (
        {"modalities__notes": {"file": "./out.csv", "kind": "text", "column": "died"}},
        "'died' among its inputs, which names the row, its label",
    ),
    "id_twice": ({"row": None}, "12 rows too many for their 'who'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_schema_that_cannot_be_is_refused(tmp_path, what):
    places, words = REFUSED[what]
    raw = patient_layouts.tables(tmp_path, schema=changed(**places))
    with pytest.raises(DataError, match=words):
        TablesRaw(raw)


def test_no_schema_is_refused(tmp_path):
    (patient_layouts.tables(tmp_path) / "schema.json").write_text("{")
    with pytest.raises(DataError, match="no YAML or JSON"):
        TablesRaw(tmp_path)
    with pytest.raises(DataError, match=r"no other\.yaml"):
        TablesRaw(tmp_path, schema="other.yaml")


def test_a_patient_in_two_splits_is_refused_without_a_name(tmp_path):
    part = ["train", "test"] + ["train"] * 22
    raw = patient_layouts.tables(tmp_path, out={"part": part})
    with pytest.raises(DataError, match="1 patients have rows in two splits") as error:
        TablesRaw(raw)
    assert "anna" not in str(error.value)


def test_shares_deal_patients_and_not_rows(tmp_path):
    shares = {"shares": {"train": 0.5, "test": 0.5}}
    raw = TablesRaw(patient_layouts.tables(tmp_path, stays=80, schema=changed(split=shares)))
    patients = {
        split: {raw.patients[row] for row in rows} for split, rows in raw.rows_of.items() if rows
    }
    assert set(patients) == {"train", "test"}
    assert patients["train"] & patients["test"] == set()
    assert len(patients["train"] | patients["test"]) == 40


def test_late_values_can_be_cut_and_are_counted(tmp_path):
    source = prepared(tmp_path, schema=changed(prediction_time=6, late="cut"))
    info = json.loads((tmp_path / "out" / "dataset_info.json").read_text())
    assert info["findings"]["vitals: events after the prediction"] == 24
    sample = source.to_sample(next(iter(source.stream("train"))))
    assert read_events(sample.payload["vitals"])[:, 0].max() == 0


def test_each_row_may_have_its_own_prediction_time(tmp_path):
    own = {"hour": [6.0] + [24.0] * 23}
    schema = changed(prediction_time={"column": "hour"}, late="cut")
    prepared(tmp_path, schema=schema, out=own)
    info = json.loads((tmp_path / "out" / "dataset_info.json").read_text())
    assert info["findings"]["vitals: events after the prediction"] == 1


def test_bad_rows_go_into_quarantine_and_are_counted(tmp_path):
    died = ["maybe", *["no", "yes"] * 11, "no"]
    age = [40.0, float("inf"), *[41.0] * 22]
    raw = patient_layouts.tables(tmp_path / "raw", out={"died": died}, static={"age": age})
    np.save(raw / "scan5.npy", np.zeros((1, 3, 3, 3), np.float32))
    (raw / "scan3.npy").write_bytes(b"no array")
    argv = ["tables", "--source", str(raw), "--output", str(tmp_path / "out")]
    assert prepare_data.main([*argv, "--max_bad_ratio", "0.5"]) == 0
    lines = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    reasons = [json.loads(line)["reason"] for line in lines]
    assert reasons[:2] == ["wrong label", "infinite or too large value in a table"]
    assert reasons[2:] == ["array file cannot be read", "scan is float32"]
    assert "maybe" not in "".join(lines)
    left_out = TablesData(str(tmp_path / "out")).left_out
    assert left_out["train, quarantined: wrong label"] == 1
    assert sum(left_out.values()) == 4


def test_survival_is_a_time_and_an_event(tmp_path):
    label = {"file": "out.csv", "column": "event", "time": "days", "kind": "survival"}
    out = {"event": [1, 0, 2, *[0] * 21], "days": [5, 7, 9, *range(21)]}
    raw = patient_layouts.tables(tmp_path / "raw", schema=changed(label=label), out=out)
    argv = ["tables", "--source", str(raw), "--output", str(tmp_path / "out")]
    assert prepare_data.main([*argv, "--max_bad_ratio", "0.5"]) == 0
    source = TablesData(str(tmp_path / "out"))
    assert [s.label for s in source.index("train")][:3] == [[5.0, 1.0], [7.0, 0.0], [0.0, 0.0]]
    assert source.problem_type == "survival"


def test_a_row_without_anything_goes_into_quarantine(tmp_path):
    schema = changed()
    schema["modalities"] = {"labs": schema["modalities"]["labs"]}
    raw = patient_layouts.tables(tmp_path / "raw", schema=schema)
    argv = ["tables", "--source", str(raw), "--output", str(tmp_path / "out")]
    assert prepare_data.main([*argv, "--max_bad_ratio", "0.5"]) == 0
    info = json.loads((tmp_path / "out" / "dataset_info.json").read_text())
    assert info["splits"]["train"]["reasons"] == {"nothing in it": 6}


def test_a_table_of_events_may_be_empty(tmp_path):
    raw = patient_layouts.tables(tmp_path)
    (raw / "labs.csv").write_text("stay,hour,test,result\n")
    assert TablesRaw(raw).parts["labs"].payload("s1") is None


@pytest.mark.parametrize("name", ["scans", "wide", "labs", "notes"])
def test_a_table_of_other_rows_is_refused(tmp_path, name):
    raw = patient_layouts.tables(tmp_path)
    path = raw / f"{name}.csv"
    head, *lines = path.read_text().splitlines()
    path.write_text("\n".join([head, *(f'"no{line[1:]}' for line in lines)]))  # "s1" -> "no1"
    with pytest.raises(DataError, match=rf"{name}.csv: none of its .* rows has a 'stay'"):
        TablesRaw(raw)


def test_files_stay_in_the_folder(tmp_path):
    scans = {"stay": ["s1", "s2"], "path": ["../secret.npy", "a\0b"]}
    raw = TablesRaw(patient_layouts.tables(tmp_path / "raw", scans=scans))
    np.save(tmp_path / "secret.npy", np.zeros(3))
    found = {row.id: row.fault for row in raw.rows("train")}
    assert found["s1"] == "a file outside the folder of the data"
    assert found["s2"] == "a file's name with a zero byte"
