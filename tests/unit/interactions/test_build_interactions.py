"""Scores of all splits to a table: modes, record, and the report's numbers by hand."""

import numpy as np
import pytest

from mm_moe.batch import Sample
from mm_moe.data.interactions.build import Judging, build_table, describe
from mm_moe.data.interactions.hard_labels import UniScores
from mm_moe.errors import ConfigError, DataError

# text and image say yes with these scores, no with 1 minus them
SAID = {
    "train": {"text": [0.9, 0.8, 0.2, 0.54], "image": [0.9, 0.3, 0.3, 0.9]},
    "test": {"text": [0.9, 0.1], "image": [0.8, 0.52]},
}
LABELS = {"train": [1, 1, 1, 0], "test": [1, 0]}
SAMPLES = {
    split: [Sample(f"{split}{n}", label=label) for n, label in enumerate(labels)]
    for split, labels in LABELS.items()
}


def scores():
    found = {"text": {}, "image": {}}
    for split, parts in SAID.items():
        for name, yes in parts.items():
            rows = np.stack([1 - np.array(yes), yes], axis=-1)
            found[name][split] = UniScores(tuple(s.id for s in SAMPLES[split]), name, rows)
    return found


def build(stored=None, **judging):
    return build_table(
        SAMPLES,
        scores(),
        dataset="toy",
        label_names=("no", "yes"),
        judging=Judging(**judging),
        stored=stored,
        origin={"labeller": "hand"},
    )


def names(table):
    return ["none" if code < 0 else table.names[code] for code in table.code_N]


def test_every_row_has_a_category_under_one_rule():
    table = build()
    assert names(table) == ["R", "U_text", "AS", "AS", "R", "U_text"]
    assert table.origin["rules"]["text"] == {"threshold": None, "min_gap": 0.0, "balance": 0.0}
    assert names(build(min_gap=0.1)) == ["R", "U_text", "AS", "none", "R", "none"]


def test_the_paper_filters_and_balances_train_alone():
    # text .54: a difference of .08 is dropped; of three, floor(.8 x 3) = 2 may say yes, 2 do
    assert names(build(mode="paper")) == ["R", "U_text", "AS", "none", "R", "U_text"]
    assert names(build(mode="paper_for_fuser")) == names(build())
    # at a bound of one half, floor(.5 x 4) = 2 of the four images may say yes: still the same two
    assert names(build(mode="paper", min_gap=0.0, balance=0.5))[1] == "U_text"


def test_predictions_as_stored():
    stored = {name: {"train": np.array([1, 1, 1, 1]), "test": np.array([0, 0])} for name in SAID}
    stored = dict(zip(("text", "image"), stored.values(), strict=True))
    assert names(build(mode="stored", stored=stored)) == ["R", "R", "R", "AS", "AS", "R"]
    with pytest.raises(ConfigError, match="--labeller files"):
        build(mode="stored")


def test_the_report_by_hand():
    about = describe(build())
    train = about["splits"]["train"]
    assert train["accuracy"] == {"text": 0.5, "image": 0.25}
    assert train["majority_label"] == 0.75
    assert train["categories"]["AS"] == {"rows": 2, "share": 0.5, "positive": 0.5}
    assert train["categories"]["U_image"] == {"rows": 0, "share": 0.0, "positive": None}
    assert "DS" not in train["categories"]
    assert "contains the label" in about["warnings"][0]
    assert about["warnings"][1].startswith("U_text is 100% positive in train and 0% in test")


def test_settings_and_scores_that_do_not_fit():
    with pytest.raises(ConfigError, match="--mode 'papers' is unknown"):
        Judging(mode="papers")
    with pytest.raises(ConfigError, match=r"--balance 0.6 must lie"):
        Judging(balance=0.6)
    with pytest.raises(ConfigError, match="no meaning with --mode stored"):
        Judging(mode="stored", min_gap=0.1)
    other = {split: rows[::-1] for split, rows in SAMPLES.items()}
    with pytest.raises(DataError, match="'text' are not of the samples of split 'train'"):
        build_table(other, scores(), dataset="t", label_names="ab", judging=Judging(), origin={})
