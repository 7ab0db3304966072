"""What is missing, counted by hand."""

import json
import math

import numpy as np
import pytest

from launch import prepare_data
from mm_moe.data import missingness
from mm_moe.data.missing import MissingProtocol
from mm_moe.data.sets.tcga_luad import TcgaLuadData
from mm_moe.errors import ConfigError
from tests import patient_layouts

NAMES = ("image", "text")


def lacking(*values):
    return np.array(values, dtype=bool)


def single(absent, labels, names=("no", "yes"), least=1):
    return missingness.association(
        absent,
        labels,
        problem_type="single_label_classification",
        label_names=names,
        least=least,
    )


def test_phi_and_chi2_by_hand():
    absent = lacking(*[1] * 30, *[0] * 70)
    labels = [1] * 20 + [0] * 10 + [1] * 20 + [0] * 50
    # table 20 10 / 20 50: phi = (20*50 - 10*20) / sqrt(30*70*40*60)
    found = single(absent, labels)
    value = 800 / math.sqrt(30 * 70 * 40 * 60)
    assert found["value"] == pytest.approx(value, abs=1e-6)
    # one degree of freedom: p = erfc(sqrt(chi2 / 2)), chi2 = N phi^2
    assert found["p"] == pytest.approx(math.erfc(math.sqrt(50) * value), rel=1e-4)
    assert found["rate_by_class"] == {"no": 0.166667, "yes": 0.5}


def test_cramers_v_is_one_where_the_class_tells_all():
    absent = lacking(1, 1, 0, 0, 0, 0)
    assert single(absent, [0, 0, 1, 1, 2, 2], names=("a", "b", "c"))["value"] == 1.0


def test_nothing_is_said_of_what_does_not_vary_or_is_too_rare():
    found = single(lacking(0, 0, 0), [0, 1, 1])
    assert (found["value"], found["p"]) == (None, None)
    assert single(lacking(1, 0, 0, 0), [1, 0, 0, 1], least=2) == {}
    assert single(lacking(1, 0), [None, None]) == {}


def test_point_biserial_by_hand():
    found = missingness.association(
        lacking(1, 1, 0, 0),
        [3.0, 5.0, 1.0, 3.0],
        problem_type="regression",
        label_names=(),
        least=1,
    )
    # means 4 and 2 around 3, spread sqrt(2): (4 - 2) / sqrt(2) * sqrt(1/4)
    assert found["value"] == pytest.approx(1 / math.sqrt(2), abs=1e-6)


def test_several_classes_a_row_have_a_phi_each():
    found = missingness.association(
        lacking(1, 1, 0, 0),
        [[1, 0], [1, 1], [0, 0], {1: 0.7}],
        problem_type="multi_label_classification",
        label_names=("a", "b"),
        least=1,
    )
    assert found["value"] == {"a": 1.0, "b": 0.0}


def test_rare_patterns_come_together():
    present = np.array([[1, 1]] * 6 + [[1, 0]] * 2 + [[0, 1]] * 1, dtype=bool)
    found = missingness.patterns(present, NAMES, least=3)
    assert {name: cell["rows"] for name, cell in found.items()} == {
        "complete": 6,
        "rarer patterns": 3,
    }


def test_nature_is_told_apart_from_what_is_imposed(tmp_path):
    source = TcgaLuadData(str(patient_layouts.tcga_luad(tmp_path)))
    missing = MissingProtocol(dataset="d", split="train", kind="protein", ratio=1.0)
    found = missingness.report(source, "train", missing=missing, least=1)
    rows = found["rows"]
    nature, taken = (found[key]["protein"]["rows"] for key in ("natural", "imposed"))
    assert nature + taken == rows == source.size("train")
    assert nature > 0
    assert found["imposed"]["gene"]["rows"] == 0
    assert all("protein" in name for name in found["patterns_left"])
    assert sum(cell["rows"] for cell in found["patterns"].values()) == rows


def test_the_program_writes_numbers_a_page_and_a_picture_without_rows(tmp_path, capsys):
    folder = patient_layouts.tcga_luad(tmp_path / "data")
    argv = ["missingness", "--dataset", "tcga_luad", "--data_dir", str(folder)]
    argv += ["--missing_type", "any", "--missing_ratio", "0.5", "--output", str(tmp_path / "out")]
    assert prepare_data.main(argv) == 0
    document = json.loads((tmp_path / "out" / "missingness.json").read_text())
    assert set(document["splits"]) == {"train", "validation", "test"}
    assert "50% of samples lack something" in document["protocol"]
    page = (tmp_path / "out" / "missingness.html").read_text()
    assert "What is missing in tcga_luad" in page
    source = TcgaLuadData(str(folder))
    ids = [sample.id for split in source.splits() for sample in source.index(split)]
    written = page + json.dumps(document) + capsys.readouterr().out
    assert not any(sample in written for sample in ids)
    assert "TCGA-00" not in written
    assert (tmp_path / "out" / "missingness.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"holds missingness\.json already"):
        prepare_data.main(argv)
    with pytest.raises(ConfigError, match="dataset_options"):
        prepare_data.main([*argv[:-1], str(tmp_path / "b"), "--dataset_options", '{"fold_": 1}'])
