"""The program that categorises: own predictors, published files, what it writes and refuses."""

import json

import numpy as np
import pytest

from launch import prepare_data
from launch.label_by_own import judge_alone
from mm_moe.batch import Sample
from mm_moe.data.interactions.published import PublishedFolder, labels_name, split_name
from mm_moe.data.interactions.table import InteractionTable
from mm_moe.data.sets.emoji import EmojiData
from mm_moe.data.sets.interaction_dial import InteractionDialData
from mm_moe.data.sets.prepared import MmsdData
from mm_moe.errors import ConfigError, DataError
from mm_moe.models.features import FrozenFeatures
from tests import raw_layouts
from tests.raw_layouts import put_json


@pytest.fixture
def mmsd(tmp_path):
    """MMSD's fixture, prepared: 6, 3 and 4 rows, labels 0 1 0 1 ..."""
    raw = raw_layouts.mmsd(tmp_path / "raw")
    out = tmp_path / "mmsd"
    assert prepare_data.main(["mmsd", "--source", str(raw), "--output", str(out)]) == 0
    return out


def flags(mmsd, *words):
    return [
        *("interactions", "--dataset", "mmsd", "--data_dir", str(mmsd), "--use_cpu"),
        *("--output", str(mmsd.parent / "table"), *words),
    ]


def run(mmsd, *words):
    assert prepare_data.main(flags(mmsd, *words)) == 0
    return InteractionTable.load(mmsd.parent / "table" / "interactions.parquet")


def said(yes, label, pred):
    return {"logits": {"Yes": yes, "No": 1 - yes}, "gth": label, "pred": pred}


def score_files(folder, *, ids, labels, image, text):
    for modality, yes in (("image", image), ("text", text)):
        rows = {key: said(p, y, int(p > 0.5)) for key, p, y in zip(ids, yes, labels, strict=True)}
        path = folder / "mmsd_data" / "data_gen_output" / labels_name("mmsd", modality)
        put_json(path, rows)
    return folder


def published(tmp_path, **changes):
    ids = [str(801 + n) for n in range(13)]
    labels = [0, 1, 0, 1, 0, 1, 0, 1, 0, 0, 1, 0, 1]
    parts = {"image": [0.9] * 13, "text": [0.1, 0.9] * 6 + [0.1]}
    return score_files(tmp_path / "scores", ids=ids, labels=labels, **parts | changes)


def test_published_files_become_a_table_and_go_back(mmsd, tmp_path, capsys):
    folder = published(tmp_path)
    raw = tmp_path / "raw" / "mmsd_data" / "data_raw"
    words = ["--labeller", "files", "--published", str(folder), "--write_published"]
    table = run(mmsd, *words, "--raw", str(raw))
    assert table.modalities == ("image", "text")
    # images always say yes; texts follow 0 1 0 1 over all 13 rows, right in train and validation
    names = ["none" if code < 0 else table.names[code] for code in table.code_N]
    assert names[:9] == ["U_text", "R"] * 3 + ["U_text", "R", "U_text"]
    assert names[9:] == ["AS", "U_image", "AS", "U_image"]
    written = PublishedFolder(tmp_path / "table", "mmsd")
    assert written.split_ids("test") == {"810": "AS", "811": "U", "812": "AS", "813": "U"}
    path = tmp_path / "table/mmsd_data/data_split_output" / split_name("mmsd", "R", "train")
    assert json.loads(path.read_text())["802"] == {"text": "words of 802 # tag", "label": 1}
    assert written.labels("text").score_N2 == pytest.approx(
        PublishedFolder(folder, "mmsd").labels("text").score_N2
    )
    report = json.loads((tmp_path / "table" / "report.json").read_text())
    assert report["splits"]["test"]["categories"]["AS"] == {
        **{"rows": 2, "share": 0.5, "positive": 0.0}
    }
    output = capsys.readouterr().out
    assert "test: 4 rows, largest class 50.0%, image alone 50.0%, text alone 0.0%" in output
    assert "a category contains the label" in output


def test_the_data_may_lack_what_the_labellers_saw(tmp_path):
    raw, out = raw_layouts.mustard(tmp_path / "raw"), str(tmp_path / "out")
    words = ["--source", str(raw), "--output", out, "--options", '{"images": false}']
    assert prepare_data.main(["mustard", *words]) == 0
    ids = ["1_60", "1_70", "1_80", "1_90", "1_105", "1_213", "2_484", "2_477"]
    files = []
    for modality, yes in (("image", [0.9] * 8), ("text", [0.9] * 4 + [0.1] * 4)):
        rows = {
            key: said(p, int(n % 2 == 0), int(p > 0.5))
            for n, (key, p) in enumerate(zip(ids, yes, strict=True))
        }
        files.append(f"{modality}={put_json(tmp_path / f'{modality}.json', rows)}")
    words = ["--dataset", "mustard", "--data_dir", out, "--output", str(tmp_path / "table")]
    words += ["--labeller", "files", "--labels", *files]
    assert prepare_data.main(["interactions", *words]) == 0
    table = InteractionTable.load(tmp_path / "table" / "interactions.parquet")
    assert [table.names[code] for code in table.code_N] == [
        *("R", "AS", "R", "AS"),
        *("U_image", "U_text", "U_image", "U_text"),
    ]


def test_the_paper_rule_on_the_same_files(mmsd, tmp_path):
    folder = published(tmp_path)
    words = ["--labeller", "files", "--published", str(folder), "--mode", "paper"]
    table = run(mmsd, *words)
    # of 6 images that all say yes, floor(.8 x 6) = 4 may: ties go to the earlier rows
    assert table.predictions["image"].tolist() == [1] * 4 + [0, 0] + [1] * 7
    assert table.origin["rules"]["image"]["gap"] == "ratio"


def test_own_predictors_cover_every_row(mmsd, capsys):
    words = ["--backbone", "small_clip", "--pretrained", "none", "--tokenizer", "builtin"]
    config = json.dumps({"patch_size": 16, "num_blocks": 1, "width": 16, "num_heads": 2})
    words += ["--backbone_config", config, "--folds", "3", "--write_published"]
    table = run(mmsd, *words)
    assert (table.code_N >= 0).all()
    assert table.splits == ("train",) * 6 + ("validation",) * 3 + ("test",) * 4
    for name in ("image", "text"):
        assert table.probabilities[name].sum(-1) == pytest.approx(np.ones(13))
        assert table.origin["heads"][name]["strength"] in (1e-3, 1e-2, 1e-1, 1.0)
    again = run(mmsd, *words, "--overwrite")
    assert again.soft_NQ.tolist() == table.soft_NQ.tolist()
    with pytest.raises(ConfigError, match="holds an interaction table already"):
        run(mmsd, *words)


def test_the_published_layout_is_checked_before_anything_is_written(tmp_path, mmsd):
    words = ["--write_published", "--output", str(tmp_path / "table")]
    with pytest.raises(ConfigError, match="'emoji' has image, text and 9 classes"):
        prepare_data.main(["interactions", "--dataset", "emoji", *words])
    files = ["--labeller", "files", "--published", str(published(tmp_path))]
    with pytest.raises(DataError, match=r"mmsd_dataset_train\.json is not there"):
        run(mmsd, *files, "--write_published", "--raw", str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="add --write_published"):
        run(mmsd, *files, "--raw", str(tmp_path))
    assert not (tmp_path / "table").exists()


def test_twins_are_held_out_together():
    # 40 texts, each of two rows, and labels that have nothing to do with them
    rng = np.random.default_rng(0)
    texts, labels = rng.normal(size=(40, 60)), rng.integers(0, 9, 40)
    rows = [(n, twin) for n in range(40) for twin in (0, 1)]
    samples = [Sample(f"{n}-{twin}", label=int(labels[n]), group=str(n)) for n, twin in rows]
    features = FrozenFeatures(tuple(s.id for s in samples), {"text": texts.repeat(2, axis=0)})
    scores, _ = judge_alone(
        "text", {"train": samples}, {"train": features}, source=EmojiData(), num_folds=5
    )
    right = scores["train"].score_NC.argmax(-1) == labels.repeat(2)
    assert right.mean() < 0.4  # a head that saw the twin would know most


def test_known_mechanisms_are_recovered(tmp_path):
    # a modality that does not say the label says its opposite, so that the category is in the data
    options = {
        "shares": {"R": 0.4, "U_first": 0.25, "U_second": 0.2, "AS": 0.15},
        **{"other": "wrong", "sizes": [900, 10, 300], "width": 9},
    }
    words = ["--dataset", "interaction_dial", "--dataset_options", json.dumps(options)]
    words += ["--output", str(tmp_path / "table"), "--backbone", "none"]
    assert prepare_data.main(["interactions", *words]) == 0
    table = InteractionTable.load(tmp_path / "table" / "interactions.parquet")
    for split in ("train", "test"):
        truth = InteractionDialData(**options).arrays(split)[2][:, 0]  # R, U_first, U_second, AS
        assert (table.code_N[table.rows_of(split)] == truth).mean() > 0.9


def test_a_row_without_scores_has_no_category(mmsd, tmp_path):
    folder = published(tmp_path)
    path = folder / "mmsd_data" / "data_gen_output" / labels_name("mmsd", "image")
    rows = json.loads(path.read_text())
    del rows["802"]
    put_json(path, rows)
    table = run(mmsd, "--labeller", "files", "--published", str(folder))
    assert table.code_N[1] == -1
    assert np.isnan(table.soft_NQ[1]).all()
    assert table.origin["not_in_the_files"]["image, train"] == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--labeller", "onw"], "'onw' is unknown; did you mean own"),
        (["--labeller", "own", "--mode", "stored"], "--mode stored is for --labeller files"),
        (["--labeller", "files"], "needs --published DIR, or --labels"),
        (["--labeller", "files", "--labels", "image=x"], "a file for two or more modalities"),
        (["--labeller", "endpoint"], "needs --url and --served_model"),
        (["--labeller", "transformers"], "needs --image_model DIR for image"),
        (["--answers", "yes"], "1 words, the data set 2 classes"),
        (["--splits", "test"], "is fitted on the split 'train'"),
        (["--backbone", "none"], "means of feature sequences, and 'mmsd' holds image, text"),
        (["--batch_size", "0"], "--batch_size 0 must be at least 1"),
        (["--folds", "9"], r"--folds 9 must lie from 2 to the number of training rows \(6\)"),
    ],
)
def test_settings_that_cannot_work(mmsd, words, message):
    if "--answers" in words:
        words = [*words, "--labeller", "transformers"]
    with pytest.raises(ConfigError, match=message):
        prepare_data.main(flags(mmsd, *words))
    assert not (mmsd.parent / "table").exists()


def test_scores_of_other_data_are_refused(mmsd, tmp_path):
    folder = published(tmp_path)
    base = ["--labeller", "files", "--published", str(folder)]
    path = folder / "mmsd_data" / "data_gen_output" / labels_name("mmsd", "text")
    rows = json.loads(path.read_text())
    put_json(path, rows | {"801": said(0.2, 1, 0)})
    with pytest.raises(DataError, match=r"another label \(gth\) than .* 1 samples, first '801'"):
        run(mmsd, *base)
    put_json(path, {f"x{key}": row for key, row in rows.items()})
    with pytest.raises(DataError, match="none of the data set's ids: it has '801'"):
        run(mmsd, *base)


def test_one_modality_alone_has_no_categories(tmp_path):
    raw, out = raw_layouts.mustard_original(tmp_path / "raw"), str(tmp_path / "out")
    words = ["--source", str(raw), "--output", out, "--options", '{"context": false}']
    assert prepare_data.main(["mustard", *words]) == 0
    words = ["--dataset", "mustard", "--data_dir", out, "--output", str(tmp_path / "table")]
    with pytest.raises(ConfigError, match="'mustard' has text alone; categories need two"):
        prepare_data.main(["interactions", *words])


def test_the_fixture_is_what_the_tests_say(mmsd):
    assert [s.label for s in MmsdData(str(mmsd)).index("train")] == [0, 1, 0, 1, 0, 1]
