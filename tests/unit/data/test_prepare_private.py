"""What private data promise, whatever their layout."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from mm_moe.data.prepare.raw import ARRAYS, EVENT_LISTS, RawDataSet, RawRow
from mm_moe.data.prepare.write import prepare
from mm_moe.data.privacy import content_key, pseudonym
from mm_moe.data.sets.prepared import PreparedData
from mm_moe.errors import DataError


class Clinic(RawDataSet):
    """Rows by split, for a test."""

    name, problem_type, task = "clinic", "regression", "regression"
    label_names, license, notes = (), "made up", ()
    private = groups_apart = True
    hours = 48.0

    def __init__(self, source: Path, rows: dict[str, list[RawRow]]) -> None:
        super().__init__(source)
        self.content = rows
        self.kinds = {"static": ARRAYS, "series": EVENT_LISTS}
        self.variables = {"series": ("pulse", "weight")}

    def splits(self):
        return tuple(self.content)

    def rows(self, split):
        yield from self.content[split]

    def indices(self):
        return [self.source / "people.csv"]


def clinic(tmp_path, **rows) -> Clinic:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "people.csv").write_text("Ada\n")
    return Clinic(tmp_path / "raw", rows)


def row(name, *, patient=None, static=(1.0, 2.0), label=0.5, **payload):
    values = {"static": np.array(static), **payload}
    return RawRow(name, values, label, group=patient)


def test_a_patient_in_two_splits_is_an_error_that_names_nobody(tmp_path):
    rows = {"train": [row("visit-1", patient="Ada")], "test": [row("visit-2", patient="Ada")]}
    with pytest.raises(DataError, match="rows in train and in test") as error:
        prepare(clinic(tmp_path, **rows), output=tmp_path / "out")
    assert "Ada" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_ids_are_pseudonyms_and_the_key_is_the_files_content(tmp_path):
    raw = clinic(tmp_path, train=[row("visit-1", patient="Ada"), row("visit-2", patient="Bob")])
    prepare(raw, output=tmp_path / "out")
    source = PreparedData(str(tmp_path / "out"))
    key = content_key([tmp_path / "raw" / "people.csv"])
    samples = list(map(source.to_sample, source.stream("train")))
    assert [s.id for s in samples] == [pseudonym(f"visit-{n}", key=key) for n in (1, 2)]
    assert [s.group for s in samples] == [pseudonym(name, key=key) for name in ("Ada", "Bob")]
    with (tmp_path / "out" / "ids.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["pseudonym"], line["id"]) for line in lines] == [
        (sample.id, f"visit-{n}") for n, sample in enumerate(samples, 1)
    ]
    (tmp_path / "other.csv").write_text("Eve\n")
    assert content_key([tmp_path / "other.csv"]) != key
    assert pseudonym("visit-1", key=key) != pseudonym("visit-2", key=key)


def test_faults_keep_their_kind_and_lose_their_values(tmp_path):
    rows = [
        row("visit-1", label=float("nan")),
        row("visit-2", series=np.array([[1.0, 5, 93.25]])),
        row("visit-3", series=np.zeros((0, 3))),
        row("visit-4", static=(1.0, np.inf)),
        RawRow("visit-5", {}, 0.5),
        row("visit-6", series=np.array([[1.0, 1, 70.0]])),
    ]
    info = prepare(clinic(tmp_path, train=rows), output=tmp_path / "out", max_bad_ratio=0.9)
    assert info["splits"]["train"]["reasons"] == {
        "wrong label": 1,
        "an event of a variable outside the 2 known in series": 1,
        "a series without an event in series": 1,
        "NaN, infinite or too large values in static": 1,
        "nothing in it": 1,
    }
    text = (tmp_path / "out" / "quarantine.jsonl").read_text()
    assert len({json.loads(line)["id"] for line in text.splitlines()}) == 5
    assert not any(word in text for word in ("visit", "nan", "93.25"))
    entry = PreparedData(str(tmp_path / "out")).sequences["series"]
    assert (entry["width"], entry["events"]["variables"]) == (3, ["pulse", "weight"])
    assert entry["events"]["mean"] == [0, 70]
