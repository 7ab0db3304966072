import csv
import gzip
import json
import os
from pathlib import Path

import numpy as np
import pytest

from launch import prepare_data
from mm_moe.data.events import EVENTS, read_events
from mm_moe.data.prepare import hospital_store
from mm_moe.data.prepare.hospital_store import EventStore, NoteStore
from mm_moe.data.sets.prepared import PreparedData
from mm_moe.errors import ConfigError, DataError
from tests import hospital_layouts as layouts


def run(name, raw, output, **options):
    words = [name, "--source", str(raw), "--output", str(output)]
    flags = ["--options", json.dumps(options)] if options else []
    assert prepare_data.main([*words, *flags, "--overwrite", "--max_bad_ratio", "0.5"]) == 0
    return PreparedData(str(output))


def found(source):
    """Key of a stay -> (split, sample), and its patient."""
    with (source.data_dir / "ids.csv").open() as file:
        lines = {line["pseudonym"]: line for line in csv.DictReader(file)}
    rows = {
        lines[sample.id]["id"]: (split, sample)
        for split in source.splits()
        for sample in map(source.to_sample, source.stream(split))
    }
    return rows, {line["id"]: line["group"] for line in lines.values()}


def check_stays(source, *, first, excluded=()):
    """Labels by the rule of the layout, and all stays of a patient in one split."""
    rows, patients = found(source)
    assert set(rows) == {f"stay-{first + n}" for n in range(layouts.STAYS) if n not in excluded}
    split_of = {}
    for key, (split, sample) in rows.items():
        n = int(key.split("-")[1]) - first
        assert sample.label == int(n % 5 == 0)
        assert split_of.setdefault(patients[key], split) == split
    assert len({sample.group for _, sample in rows.values()}) == len(split_of)
    return rows


def by_variable(source, sample, modality):
    names = source.sequences[modality][EVENTS]["variables"]
    events = read_events(sample.payload[modality])
    return [(round(float(h), 3), names[int(v)], float(value)) for h, v, value in events]


# --- the store ----------------------------------------------------------------------------------


def test_events_come_back_by_stay_from_buckets(monkeypatch):
    monkeypatch.setattr(hospital_store, "BUCKET_STAYS", 3)
    store = EventStore(np.array([True, True, True, False, True, True, True]))
    stays, items = np.array([6, 0, 3, 0, 6]), np.array(["b", "a", "a", "b", "a"])
    store.add(stays, items, np.array([2.0, 1, 1, 0.5, 1]), np.arange(5.0))
    store.add(np.array([6]), np.array(["c"]), np.array([0.0]), np.array([7.0]))
    store.settle(min_stays=2, max_variables=9)
    # a: training stays 0, 6 (3 does not count); b: 0, 6; c: 6 alone
    assert (store.variables, store.left_out) == (("a", "b"), 1)
    assert store.get(6).tolist() == [[1, 0, 4], [2, 1, 0]]
    assert store.get(0).tolist() == [[0.5, 1, 3], [1, 0, 1]]
    assert store.get(3).tolist() == [[1, 0, 2]]
    assert store.get(1) is None
    folder = store._buckets.folder
    assert folder.stat().st_mode & 0o777 == 0o700
    del store
    assert not folder.exists()


def test_the_variables_that_most_stays_have_are_kept():
    store = EventStore(np.ones(3, bool))
    stays, items = np.array([0, 1, 2, 0, 1, 2, 2]), np.array(list("aaabbcc"))
    store.add(stays, items, np.zeros(7), np.zeros(7))
    store.settle(min_stays=1, max_variables=2)
    assert store.variables == ("a", "b")


def test_notes_are_joined_in_order_and_cut_at_the_front():
    store = NoteStore()
    store.add([4, 4, 5], [3.0, 1.0, 0.0], ["late", "early", "other"])
    assert store.get(4, max_chars=99) == "early\n\nlate"
    assert store.get(4, max_chars=4) == "late"
    assert store.get(0, max_chars=4) is None


# --- the layouts --------------------------------------------------------------------------------


def test_mimic3_by_hand(tmp_path, capsys):
    source = run("mimic3", layouts.mimic3(tmp_path / "raw"), tmp_path / "out", min_stays=3)
    assert source.modalities == ("static", "vitals", "labs", "text", "codes")
    rows = check_stays(source, first=5000, excluded=(6, 7))  # both of the child
    for n in (0, 1, 8):
        sample = rows[f"stay-{5000 + n}"][1]
        assert by_variable(source, sample, "vitals") == [
            (1.0, "Heart Rate (211)", 60 + n),
            (3.0, "Respiratory Rate (618)", 18 + n % 2),
            (47.0, "Heart Rate (211)", 70 + n),
        ]
        assert by_variable(source, sample, "labs") == [(6.0, "Anion Gap (50868)", 10 + n)]
    findings = source.info["findings"]
    assert findings["vitals events after the prediction time"] == 38
    assert findings["vitals events stored after the prediction time"] == 38
    assert findings["vitals events before the stay"] == 38
    assert findings["vitals events without a number"] == 38
    assert findings["vitals events marked as errors"] == 1
    assert findings["stays of patients under min_age"] == 2
    assert rows["stay-5000"][1].payload["text"] == layouts.NOTE
    assert "text" not in rows["stay-5001"][1].payload
    assert findings["notes after the prediction time"] == 1
    assert findings["discharge summaries left out"] == 1
    assert "vitals events after the prediction time: 38" in capsys.readouterr().out


def test_codes_are_those_of_stays_that_had_ended(tmp_path):
    source = run("mimic3", layouts.mimic3(tmp_path / "raw"), tmp_path / "out", min_stays=1)
    rows, _ = found(source)
    for key, (_, sample) in rows.items():
        n = int(key.split("-")[1]) - 5000
        # a patient's stays are n and n + 1 for even n, a month apart
        assert ("codes" in sample.payload) == (n % 2 == 1), n


def test_mimic4_by_hand(tmp_path):
    source = run("mimic4", layouts.mimic4(tmp_path / "raw"), tmp_path / "out", min_stays=3)
    rows = check_stays(source, first=5000)
    sample = rows["stay-5008"][1]
    assert by_variable(source, sample, "vitals") == [
        (1.0, "Heart Rate (211)", 68),
        (3.0, "618", 18),
        (47.0, "Heart Rate (211)", 78),
    ]
    assert by_variable(source, sample, "labs") == [(6.0, "50868", 18)]
    assert rows["stay-5000"][1].payload["text"] == layouts.NOTE
    assert source.info["findings"]["notes after the prediction time"] == 1
    static = source.info["findings"]["static"]["columns"]
    assert ["age", "numeric", 1] in static


def test_eicu_by_hand(tmp_path):
    source = run("eicu", layouts.eicu(tmp_path / "raw"), tmp_path / "out", min_stays=3)
    rows = check_stays(source, first=7000)
    sample = rows["stay-7003"][1]
    assert by_variable(source, sample, "vitals") == [
        (1.0, "heartrate", 63),
        (1.0, "sao2", 97),
        (47.0, "heartrate", 73),
        (47.0, "sao2", 97),
    ]
    assert by_variable(source, sample, "labs") == [(6.0, "glucose", 103)]
    assert "labs" not in rows["stay-7008"][1].payload  # revised after the prediction time
    assert "codes" not in sample.payload  # entered after it
    assert rows["stay-7002"][1].payload["codes"].array().tolist() == [1]
    assert source.info["findings"]["later unit stays of one admission"] == 1
    assert source.info["findings"]["labs events stored after the prediction time"] == 1


def test_length_of_stay_and_chunks_of_any_size(tmp_path):
    raw = layouts.mimic3(tmp_path / "raw")
    whole = run("mimic3", raw, tmp_path / "a", label="los", min_stays=3)
    small = run("mimic3", raw, tmp_path / "b", label="los", min_stays=3, chunk_rows=7)
    for source in (whole, small):
        rows, _ = found(source)
        for key, (_, sample) in rows.items():
            assert sample.label == int(int(key.split("-")[1]) % 4 == 0)
    hashes = [
        {split: about["content_sha256"] for split, about in source.info["splits"].items()}
        for source in (whole, small)
    ]
    assert hashes[0] == hashes[1]


def test_stays_of_three_days_end_before_the_fourth(tmp_path):
    source = run(
        "mimic3", layouts.mimic3(tmp_path / "raw"), tmp_path / "out", hours=72, min_stays=3
    )
    rows, _ = found(source)
    assert {int(key.split("-")[1]) % 4 for key in rows} == {0}
    assert (
        source.info["findings"]["stays that ended before the prediction time"] == 28
    )  # and the child's two


def test_statistics_are_those_of_training_stays(tmp_path):
    source = run("eicu", layouts.eicu(tmp_path / "raw"), tmp_path / "out", min_stays=3)
    rows, _ = found(source)
    values = [
        value
        for split, sample in rows.values()
        if split == "train"
        for _, name, value in by_variable(source, sample, "vitals")
        if name == "heartrate"
    ]
    about = source.sequences["vitals"][EVENTS]
    place = about["variables"].index("heartrate")
    assert about["mean"][place] == pytest.approx(np.mean(values))
    assert about["std"][place] == pytest.approx(np.std(values))


# --- bad input ----------------------------------------------------------------------------------


def test_missing_tables_and_columns_are_named(tmp_path):
    raw = layouts.mimic4(tmp_path / "raw")
    (raw / "hosp" / "patients.csv.gz").unlink()
    with pytest.raises(DataError, match=r"no patients\.csv"):
        run("mimic4", raw, tmp_path / "out")
    raw = layouts.eicu(tmp_path / "raw2")
    layouts.put_gz(raw / "lab.csv.gz", "patientunitstayid,labresultoffset,labname", [])
    with pytest.raises(DataError, match="no column 'labresult'"):
        run("eicu", raw, tmp_path / "out")


def test_a_table_that_was_cut_is_told(tmp_path):
    raw = layouts.mimic3(tmp_path / "raw")
    path = raw / "CHARTEVENTS.csv.gz"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="is the download whole"):
        run("mimic3", raw, tmp_path / "out")


def test_stays_with_bad_times_or_outcomes_go_to_quarantine(tmp_path):
    raw = layouts.eicu(tmp_path / "raw")
    text = gzip.decompress((raw / "patient.csv.gz").read_bytes()).decode()
    text = text.replace("Expired", "", 1).replace("7002,002-1,42,1,4320", "7002,002-1,42,1,-5")
    text = text.replace("7004,002-2,", "7004,,").replace("7006,002-3,", ",002-3,")
    (raw / "patient.csv.gz").write_bytes(gzip.compress(text.encode()))
    source = run("eicu", raw, tmp_path / "out", min_stays=3)
    lines = (source.data_dir / "quarantine.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["reason"] for line in lines) == [
        "no patient is named",
        "no stay is named",
        "times of the stay are missing or out of order",
        "wrong label",
    ]
    assert not any(f"stay-{n}" in "".join(lines) for n in (7000, 7002, 7004))


def test_diagnoses_without_a_text_are_none(tmp_path):
    raw = layouts.eicu(tmp_path / "raw")
    lines = [(7000 + n, 60, None) for n in range(40)]
    layouts.put_gz(
        raw / "diagnosis.csv.gz", "patientunitstayid,diagnosisoffset,diagnosisstring", lines
    )
    assert "codes" not in run("eicu", raw, tmp_path / "out", min_stays=3).modalities


@pytest.mark.filterwarnings("error")
def test_a_series_without_a_time_is_left_out_and_said(tmp_path, capsys):
    raw = layouts.mimic3(tmp_path / "raw")
    lines = [(1000, 5000 + n, 211, 1e30, 70, 0) for n in range(40)]
    heading = "subject_id,hadm_id,itemid,charttime,valuenum,error"
    layouts.put_gz(raw / "CHARTEVENTS.csv.gz", heading, lines)
    assert "vitals" not in run("mimic3", raw, tmp_path / "out", min_stays=3).modalities
    said = capsys.readouterr().out
    assert "vitals events without a time: " in said
    assert "modalities not there: vitals" in said


def test_tables_of_other_patients_are_refused(tmp_path):
    raw = layouts.mimic3(tmp_path / "raw")
    layouts.put_gz(raw / "PATIENTS.csv.gz", "subject_id,gender,dob", [(1, "F", "2080-01-01")])
    with pytest.raises(DataError, match="no patient in common"):
        run("mimic3", raw, tmp_path / "out")


def test_options_that_cannot_be(tmp_path):
    raw = layouts.eicu(tmp_path / "raw")
    with pytest.raises(ConfigError, match="mortality"):
        run("eicu", raw, tmp_path / "out", label="death")
    with pytest.raises(ConfigError, match="7 days is over"):
        run("eicu", raw, tmp_path / "out", label="los", hours=200)
    with pytest.raises(DataError, match="lasts over 9999 hours"):
        run("eicu", raw, tmp_path / "out", hours=9999)


# --- the real demo ------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_real_demo_of_mimic3(tmp_path):
    beside = Path(__file__).parents[4] / "shared" / "data"
    raw = Path(os.environ.get("MM_MOE_DATA", beside)) / "mimic3_demo"
    if not raw.is_dir():
        pytest.skip(f"no data in {raw}; set MM_MOE_DATA to the folder of the data sets")
    source = run("mimic3", raw, tmp_path / "out")
    assert sum(source.size(split) for split in source.splits()) == 114
    rows, patients = found(source)
    assert 0.2 < np.mean([sample.label for _, sample in rows.values()]) < 0.5
    split_of = {}
    for key, (split, sample) in rows.items():
        assert split_of.setdefault(patients[key], split) == split
        for modality in {"vitals", "labs"} & set(sample.payload):
            events = read_events(sample.payload[modality])
            assert events[:, 0].min() >= 0
            assert events[:, 0].max() <= 48
            assert np.isfinite(events).all()
    names = source.sequences["vitals"][EVENTS]["variables"]
    assert "Heart Rate (211)" in names
