import pickle
import random

import numpy as np
import pytest

from launch import prepare_data
from mm_moe.data.prepare.mimic_impk import mortality_class, published_split
from mm_moe.data.sets.prepared import PreparedData
from mm_moe.errors import ConfigError, DataError
from tests import raw_layouts


def run(source, *flags):
    output = source.parent / "out"
    words = ["mimic_impk", "--source", str(source), "--output", str(output), *flags]
    assert prepare_data.main(words) == 0
    return PreparedData(str(output))


def samples(source, split):
    return {row["id"]: source.to_sample(row) for row in source.stream(split)}


def array(sample, modality, width):
    return np.frombuffer(sample.payload[modality], dtype="<f4").reshape(-1, width)


def content_of(folder):
    return pickle.loads((folder / "im.pk").read_bytes())


def test_the_published_split_is_pythons_shuffle_at_seed_10():
    rows = list(range(57))
    random.seed(10)
    random.shuffle(rows)
    found = published_split(57)
    assert (found["validation"], found["test"]) == (rows[:5], rows[5:11])
    assert found["train"] == rows[11:]


def test_mortality_is_the_first_column_after_column_0():
    assert mortality_class(np.array([1, 0, 0, 0, 0, 0.0])) == 0
    assert mortality_class(np.array([0, 0, 1, 1, 0, 1.0])) == 2
    assert mortality_class(np.array([1, 0, 0, 0, 0, 1.0])) == 5


def test_rows_keep_their_24_hours_and_mended_values_are_counted(tmp_path, capsys):
    folder = raw_layouts.mimic_impk(tmp_path / "raw")
    source, content = run(folder / "im.pk"), content_of(folder)  # the file itself will do
    assert source.task == "single_label_classification"
    assert len(source.label_names) == 6
    found = {id: s for split in source.splits() for id, s in samples(source, split).items()}
    assert len(found) == 40
    assert {split: source.size(split) for split in source.splits()} == {
        "train": 32,
        "validation": 4,
        "test": 4,
    }
    for n in (0, 2, 7):
        sample = found[f"stay-{n}"]
        series = np.nan_to_num(content["ep_tdata"][n], posinf=0, neginf=0).astype("<f4")
        assert np.array_equal(array(sample, "series", 12), series)  # also the stay of zeros
        assert array(sample, "static", 5).shape == (1, 5)
        assert sample.label == mortality_class(content["adm_labels_all"][n])
    said = capsys.readouterr().out
    assert "values mended (series NaN or infinite to 0)" in said
    mended = [record["repairs"] for record in source.info["splits"].values()]
    assert sum(r.get("series NaN or infinite to 0", 0) for r in mended) == 2
    assert sum(r.get("static NaN or infinite to 0", 0) for r in mended) == 1


@pytest.mark.parametrize("statistics", ["train", "all"])
def test_statistics_are_those_of_the_training_rows_unless_all_are_asked_for(tmp_path, statistics):
    folder = raw_layouts.mimic_impk(tmp_path / "raw")
    content = content_of(folder)
    flag = f'{{"task": "icd9_7", "statistics": "{statistics}"}}'
    source = run(folder, "--options", flag)
    rows = published_split(40)["train"] if statistics == "train" else list(range(40))
    values = np.nan_to_num(content["ep_tdata"], posinf=0, neginf=0)[rows]
    about = source.sequences["series"]
    assert (about["width"], about["length"]) == (12, 24)
    assert about["mean"] == pytest.approx(values.mean((0, 1)).tolist(), abs=1e-5)
    assert about["std"] == pytest.approx(values.std((0, 1)).tolist(), abs=1e-5)
    assert source.task == "binary_auprc"
    for id, sample in samples(source, "train").items():
        assert sample.label == content["y_icd9"][int(id.split("-")[1]), 7]


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda c: c.pop("y_icd9"), "y_icd9 is not there"),
        (lambda c: c.update(ep_tdata=c["ep_tdata"][:, :20]), r"\(N, 24, 12\)"),
        (lambda c: c.update(y_icd9=c["y_icd9"][:-1]), "differ in their number of rows"),
    ],
)
def test_another_layout_is_refused_by_name(tmp_path, break_it, said):
    folder = raw_layouts.mimic_impk(tmp_path / "raw")
    content = content_of(folder)
    break_it(content)
    (folder / "im.pk").write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match=said):
        run(folder)


def test_an_unknown_task_lists_the_known_ones(tmp_path):
    folder = raw_layouts.mimic_impk(tmp_path / "raw")
    with pytest.raises(ConfigError, match="icd9_1"):
        run(folder, "--options", '{"task": "icd9_2"}')


@pytest.mark.parametrize(("key", "task"), [("adm_labels_all", "mortality"), ("y_icd9", "icd9_1")])
def test_label_that_is_nan_is_no_class_0(tmp_path, key, task):
    raw = raw_layouts.mimic_impk(tmp_path / "raw")
    content = content_of(raw)
    content[key] = content[key].astype(float)
    content[key][published_split(40)["train"][0], 1] = np.nan
    content[key][published_split(40)["train"][1], 1] = 3  # no class either
    (raw / "im.pk").write_bytes(pickle.dumps(content))
    source = run(raw, "--options", f'{{"task": "{task}"}}', "--max_bad_ratio", "0.1")
    assert source.info["splits"]["train"]["reasons"] == {
        "NaN or infinite label": 1,
        "wrong label": 1,
    }
    assert source.size("train") == 30


@pytest.mark.parametrize(("key", "task"), [("adm_labels_all", "mortality"), ("y_icd9", "icd9_1")])
def test_nan_that_no_label_is_read_from_costs_no_stay(tmp_path, key, task):
    raw = raw_layouts.mimic_impk(tmp_path / "raw")
    content = content_of(raw)
    content[key] = content[key].astype(float)
    content[key][:, 0] = np.nan  # the label is in column 1, or in 1 to 5
    (raw / "im.pk").write_bytes(pickle.dumps(content))
    assert run(raw, "--options", f'{{"task": "{task}"}}').size("train") == 32
