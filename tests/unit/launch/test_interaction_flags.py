"""Categories reach training batches and nothing else; a table that does not fit is refused."""

import argparse

import numpy as np
import pytest
import torch

from launch.interaction_flags import check_interactions
from mm_moe.data.collate import Collator
from mm_moe.data.interactions.table import table_of
from mm_moe.data.interactions.training import TrainingInteractions
from mm_moe.data.sets.emoji import EmojiData
from mm_moe.errors import ConfigError, DataError

EMOJI = EmojiData()
TRAIN = list(EMOJI.index("train"))
TEST = list(EMOJI.index("test"))[:2]


def emoji_table(*, train=TRAIN, **changes):
    """Text always right, image right on every second row, nothing said of the first."""
    samples = [*train, *TEST]
    labels = np.array([sample.label for sample in samples])
    image = np.where(np.arange(len(labels)) % 2, labels, (labels + 1) % 9)
    said = {"image": np.where(np.arange(len(labels)) == 0, -1, image), "text": labels}
    eye = np.concatenate([np.eye(9), np.full((1, 9), np.nan)])
    fields = {
        "dataset": "emoji",
        "label_names": EMOJI.label_names,
        "ids": [sample.id for sample in samples],
        "splits": ["train"] * len(train) + ["test"] * len(TEST),
        "label_N": labels,
        "predictions": said,
        "probabilities": {name: eye[codes] for name, codes in said.items()},
        "origin": {},
    }
    return table_of(**fields | changes)


def collate(samples, **options):
    collator = Collator(
        modalities=("text",),
        processors={"text": lambda texts: {"x": torch.zeros(len(texts))}},
        problem_type="single_label_classification",
        num_labels=9,
        **options,
    )
    return collator(samples)


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("coarse", [-100, 0, 1]),
        ("fine", [-100, 0, 2]),  # bit 1 is text
        ("coarse_soft", [[0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]]),
        ("fine_soft", [[0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [0, 0, 1, 0, 0]]),
    ],
)
def test_training_batches_carry_the_category(form, expected):
    known = TrainingInteractions(emoji_table(), split="train", form=form)
    batch = collate(TRAIN[:3], interactions=known)
    assert batch["interaction"].tolist() == expected
    assert collate([], interactions=known)["interaction"].shape[0] == 0
    assert "interaction" not in collate(TRAIN[:3])


def test_rows_of_other_splits_have_no_category_to_give():
    known = TrainingInteractions(emoji_table(), split="train")
    with pytest.raises(DataError, match=f"2 samples .* first '{TEST[0].id}'"):
        collate(TEST, interactions=known)
    with pytest.raises(DataError, match="no row of split 'validation'; it has test, train"):
        TrainingInteractions(emoji_table(), split="validation")
    with pytest.raises(ConfigError, match="'soft' is unknown"):
        TrainingInteractions(emoji_table(), split="train", form="soft")


def flags(tmp_path, table, **changes):
    values = {
        "moe_enable": True,
        "router": "topk_softmax",
        "interaction_table": None if table is None else str(tmp_path / "table.parquet"),
        "interaction_labels": "coarse",
        "train_split": "train",
        "moe_config": None,
        "final_evaluation": True,
        "eval_strategy": "no",
    }
    if table is not None:
        table.save(tmp_path / "table.parquet")
    return argparse.Namespace(**values | changes)


def test_a_table_that_fits_is_taken(tmp_path):
    check_interactions(flags(tmp_path, emoji_table()), EMOJI)
    check_interactions(flags(tmp_path, None), EMOJI)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": TRAIN[2:]}, rf"2 of {len(TRAIN)} samples .* first '{TRAIN[0].id}'"),
        ({"dataset": "other"}, "is of 'other' with 9 classes, the data set is 'emoji'"),
        ({"label_N": np.zeros(len(TRAIN) + 2, dtype=int)}, "have another label"),
    ],
)
def test_a_table_of_other_data_is_refused(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        check_interactions(flags(tmp_path, emoji_table(**changes)), EMOJI)


def test_hard_routing_by_category_is_for_training_alone(tmp_path):
    routed = {"router": "by_interaction", "final_evaluation": False}
    with pytest.raises(ConfigError, match="contains the label"):
        check_interactions(flags(tmp_path, emoji_table(), router="by_interaction"), EMOJI)
    with pytest.raises(ConfigError, match="give --interaction_table FILE"):
        check_interactions(flags(tmp_path, None, **routed), EMOJI)
    fine = {"interaction_labels": "fine", **routed}
    with pytest.raises(ConfigError, match="tells 4 types apart, --interaction_labels fine has 5"):
        check_interactions(flags(tmp_path, emoji_table(), **fine), EMOJI)
    with pytest.raises(DataError, match=r"1 training rows .* have no category"):
        check_interactions(flags(tmp_path, emoji_table(), **routed), EMOJI)
