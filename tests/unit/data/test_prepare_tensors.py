import csv
import json
import pickle

import numpy as np
import pytest
import torch

from launch import prepare_data
from mm_moe.data.sets.prepared import PreparedData
from mm_moe.errors import DataError
from tests import hospital_layouts as layouts


def run(raw, *flags):
    output = raw.parent / "out"
    words = ["mimic_tensors", "--source", str(raw), "--output", str(output), *flags]
    assert prepare_data.main(words) == 0
    return PreparedData(str(output))


def found(source):
    with (source.data_dir / "ids.csv").open() as file:
        names = {line["pseudonym"]: int(line["id"].split("-")[1]) for line in csv.DictReader(file)}
    return {
        names[sample.id]: (split, sample)
        for split in source.splits()
        for sample in map(source.to_sample, source.stream(split))
    }


def split_file(raw, **changed):
    names = [1000 + n for n in range(20)]
    lists = {"training": names[:12], "validation": names[12:16], "testing": names[16:]}
    (raw / "PTID_splits_mimic.json").write_text(json.dumps({**lists, **changed}))


def test_rows_are_standardised_by_training_rows_and_gaps_are_missing(tmp_path):
    raw = layouts.mimic_tensors(tmp_path / "raw")
    split_file(raw)
    source = run(raw)
    assert {split: source.size(split) for split in source.splits()} == {
        "train": 24,
        "validation": 8,
        "test": 8,
    }
    rows = found(source)
    notes = torch.load(raw / "note_x.pt", weights_only=True).numpy()
    train = np.delete(notes[:24], 3, axis=0)
    for n, (_, sample) in rows.items():
        assert sample.label == n % 2
        assert ("notes" in sample.payload) == (n != 3)
        assert ("codes" in sample.payload) == (n != 4)
        if n != 3:
            expected = (notes[n] - train.mean(0)) / train.std(0)
            assert np.allclose(sample.payload["notes"].array(), expected, atol=1e-5)


def test_own_split_keeps_patients_together(tmp_path):
    rows = found(run(layouts.mimic_tensors(tmp_path / "raw")))
    assert all(rows[n][0] == rows[n + 1][0] for n in range(0, 40, 2))
    assert len({split for split, _ in rows.values()}) == 3


def in_two_splits(raw):
    split_file(raw, validation=[1000])


def shorter(raw):
    torch.save(torch.ones(39, 5), raw / "note_x.pt")


def program(raw):
    (raw / "lab_x.pt").write_bytes(pickle.dumps(print, protocol=2))


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (in_two_splits, "entry 1 of 'validation' is in an earlier split"),
        (shorter, r"39 rows, labels.csv has 40"),
        (program, "no file of a plain tensor"),
        (lambda raw: (raw / "code_x.pt").unlink(), "there is no code_x.pt"),
        (lambda raw: split_file(raw, testing=None), "no list 'testing'"),
    ],
)
def test_bad_input_is_refused(tmp_path, break_it, said):
    raw = layouts.mimic_tensors(tmp_path / "raw")
    break_it(raw)
    with pytest.raises(DataError, match=said):
        run(raw)


def test_labels_and_values_that_are_bad_go_to_quarantine(tmp_path):
    raw = layouts.mimic_tensors(tmp_path / "raw")
    split_file(raw)
    values = torch.load(raw / "lab_x.pt", weights_only=True)
    values[7, 2] = float("nan")
    torch.save(values, raw / "lab_x.pt")
    path = raw / "labels.csv"
    path.write_text(path.read_text().replace("1000,1", "1000,2"))
    source = run(raw, "--max_bad_ratio", "0.5")
    assert source.info["splits"]["train"]["reasons"] == {
        "wrong label": 1,
        "NaN or infinite values in labs": 1,
    }
