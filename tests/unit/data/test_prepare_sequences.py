import builtins
import os
import pickle
import subprocess
from pathlib import Path

import numpy as np
import pytest

from launch import prepare_data
from mm_moe.data.prepare.pickles import read_arrays
from mm_moe.data.sets.prepared import PreparedData
from mm_moe.errors import ConfigError, DataError
from tests import raw_layouts
from tests.raw_layouts import put


def run(name, source, *flags):
    output = source.parent / "out"
    assert prepare_data.main([name, "--source", str(source), "--output", str(output), *flags]) == 0
    return PreparedData(str(output))


def samples(source, split):
    return [source.to_sample(row) for row in source.stream(split)]


def array(sample, modality):
    values = np.frombuffer(sample.payload[modality], dtype="<f4")
    return values.reshape(-1, raw_layouts.WIDTHS[modality])


def quarantine(source):
    text = Path(source.data_dir, "quarantine.jsonl").read_text()
    return [line for line in text.splitlines() if line]


# ---- MOSI, MOSEI, SIMS -----------------------------------------------------------------------


def test_mosi_sequences_come_back_without_padding_and_infinities(tmp_path, capsys):
    source = run("cmu_mosi", raw_layouts.cmu_mosi(tmp_path / "raw"))
    content = raw_layouts.sentiment_split(6, seed=6)
    train = samples(source, "train")
    assert [row.id for row in train[:2]] == ["train-0", "train-1"]
    assert [row.label for row in train] == content["labels"].reshape(-1).tolist()
    assert np.array_equal(array(train[1], "text"), content["text"][1, 2:])
    assert np.array_equal(array(train[1], "vision"), content["vision"][1, :-1].astype("<f4"))
    audio = content["audio"][0].astype("<f4")
    audio[3, 1] = 0
    assert np.array_equal(array(train[0], "audio"), audio)
    assert set(train[2].payload) == {"text", "audio"}
    assert source.modalities == ("text", "audio", "vision")
    assert (source.problem_type, source.task) == ("regression", "sentiment_mosi")
    said = capsys.readouterr().out
    assert "train: 6 rows; 1 without vision; 1 values mended (audio -inf to 0)" in said


def test_shapes_and_spread_are_those_of_the_training_rows(tmp_path):
    source = run("cmu_mosi", raw_layouts.cmu_mosi(tmp_path / "raw"))
    about = source.info["modalities"]["audio"]
    audio = np.concatenate([array(row, "audio") for row in samples(source, "train")])
    assert (about["width"], about["length"], len(audio)) == (4, 7, 6 * 7)
    assert about["mean"] == pytest.approx(audio.mean(0).tolist(), abs=1e-5)
    assert about["std"] == pytest.approx(audio.std(0).tolist(), abs=1e-5)


def test_mosei_ids_and_old_pickles(tmp_path):
    source = run("cmu_mosei", raw_layouts.cmu_mosei(tmp_path / "raw"))
    assert samples(source, "validation")[1].id == "validvid/1.5/2.5"
    assert source.info["options"] == {"file": "mosei_senti_data.pkl"}


def test_sims_labels_are_one_number_a_row(tmp_path):
    source = run("ch_sims", raw_layouts.ch_sims(tmp_path / "raw"))
    labels = [row.label for row in samples(source, "train")]
    assert labels == pytest.approx([-1, -0.3, 0.3, 1])
    assert source.task == "sentiment_sims"
    assert samples(source, "test")[0].id == "video_test$_$0000"


def test_bad_sequences_are_named(tmp_path):
    raw = raw_layouts.cmu_mosi(tmp_path / "raw")
    content = pickle.loads((raw / "mosi_data.pkl").read_bytes())
    train = content["train"]
    train["text"][0, 3, 0] = np.nan
    train["audio"][1, 0, 0] = np.inf
    train["labels"][2] = np.nan
    train["labels"][3] = 7
    for name in ("text", "audio", "vision"):
        train[name][4] = 0
    put(raw / "mosi_data.pkl", pickle.dumps(content))
    source = run("cmu_mosi", raw, "--max_bad_ratio", "0.9")
    reasons = ["NaN in text", "infinite", "no label", "wrong label: 7 is outside", "nothing in it"]
    for n, (line, reason) in enumerate(zip(quarantine(source), reasons, strict=True)):
        assert f'"train-{n}"' in line
        assert reason in line
    assert source.size("train") == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.pop("valid"), "has no split 'valid'"),
        (lambda c: c["test"].pop("vision"), "test.vision is not there"),
        (lambda c: c["test"].update(text=np.zeros((3, 2))), r"test.text has shape \(3, 2\)"),
        (lambda c: c["train"].update(labels=np.zeros((6, 7))), "one number a row"),
        (lambda c: c["train"].update(id=["a"]), "1 of 6 ids"),
    ],
)
def test_a_pickle_in_another_layout(tmp_path, change, said):
    raw = raw_layouts.cmu_mosi(tmp_path / "raw")
    content = pickle.loads((raw / "mosi_data.pkl").read_bytes())
    change(content)
    put(raw / "mosi_data.pkl", pickle.dumps(content))
    with pytest.raises(DataError, match=said):
        run("cmu_mosi", raw)


def test_the_pickle_is_found_or_named(tmp_path):
    raw = raw_layouts.cmu_mosi(tmp_path / "raw")
    (raw / "mosi_data.pkl").rename(raw / "mine.pkl")
    assert run("cmu_mosi", raw).info["options"] == {"file": "mine.pkl"}
    put(raw / "other.pkl", b"")
    with pytest.raises(DataError, match=r"no mosi_data.pkl .* 2 other .pkl files"):
        run("cmu_mosi", raw, "--overwrite")
    run("cmu_mosi", raw, "--overwrite", "--options", '{"file": "mine.pkl"}')


# ---- pickles that are no data ----------------------------------------------------------------


class Evil:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "name"),
    [(os.system, "system"), (subprocess.Popen, "Popen"), (builtins.eval, "eval"), (open, "open")],
)
def test_a_pickle_that_would_run_something_is_refused_unrun(tmp_path, function, name):
    mark = tmp_path / "ran"
    words = {os.system: f"touch {mark}", builtins.eval: f"open({str(mark)!r}, 'w')"}
    arguments = (str(mark), "w") if function is open else (words.get(function, ["touch", mark]),)
    raw = raw_layouts.cmu_mosi(tmp_path / "raw")
    content = pickle.loads((raw / "mosi_data.pkl").read_bytes())
    content["train"]["id"] = Evil(function, *arguments)
    put(raw / "mosi_data.pkl", pickle.dumps(content))
    with pytest.raises(DataError, match=rf"asks for .*\.{name}, which is no plain data"):
        run("cmu_mosi", raw)
    assert not mark.exists()


def test_what_plain_pickles_hold_comes_back(tmp_path):
    for protocol in (0, 2, 4, 5):
        content = {"a": np.arange(6.0).reshape(2, 3), "s": np.float32(2), "b": b"\xff", "l": [1]}
        content["o"] = np.array(["x", None], dtype=object)
        found = read_arrays(put(tmp_path / "p.pkl", pickle.dumps(content, protocol=protocol)))
        assert np.array_equal(found.pop("a"), content.pop("a"))
        assert np.array_equal(found.pop("o"), content.pop("o"))
        assert found == content
    with pytest.raises(DataError, match="no pickle of arrays"):
        read_arrays(put(tmp_path / "p.pkl", b"\x80\x05 cut"))


# ---- IEMOCAP ---------------------------------------------------------------------------------


def test_iemocap(tmp_path):
    pytest.importorskip("h5py", reason="pip install h5py")
    raw = raw_layouts.iemocap(tmp_path / "raw")
    source = run("iemocap", raw, "--options", '{"fold": 2}')
    train = samples(source, "train")
    assert [(row.id, row.label) for row in train[3:]] == [("Ses01_trn_3", 3), ("Ses01_trn_4", 0)]
    assert array(train[4], "audio").shape == (7 + 4, 4)
    assert source.info["modalities"]["text"]["length"] == 5 + 4
    assert len(source.label_names) == 4
    assert "target/2/tst_label.npy" in source.info["sources"]
    with pytest.raises(DataError, match=r"no target/3/trn_int2name.npy"):
        run("iemocap", raw, "--overwrite", "--options", '{"fold": 3}')


def test_iemocap_without_the_reader(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    raw = tmp_path / "raw"
    for place in ("L/bert_large.h5", "A/comparE.h5", "V/denseface.h5"):
        put(raw / place, b"")
    for split in ("trn", "val", "tst"):
        folder = raw / "target" / "1"
        folder.mkdir(parents=True, exist_ok=True)
        np.save(folder / f"{split}_label.npy", np.eye(4))
        np.save(folder / f"{split}_int2name.npy", np.array([[b"a"], [b"b"], [b"c"], [b"d"]]))
    with pytest.raises(ConfigError, match="pip install h5py"):
        run("iemocap", raw)
