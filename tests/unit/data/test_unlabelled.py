"""A labelled data set under an objective without labels."""

import argparse

from launch.checks import open_source
from launch.cli import RecipeParser
from mm_moe.data.schema import NO_LABEL
from mm_moe.data.sets.emoji import EmojiData
from mm_moe.data.unlabelled import Unlabelled


def flags(objective: str) -> argparse.Namespace:
    words = ["--dataset", "emoji", "--dataset_options", "{}", "--objective", objective]
    return RecipeParser().namespace(words)


def test_the_samples_stay_and_the_labels_go():
    labelled, bare = EmojiData(), Unlabelled(EmojiData())
    row = next(iter(labelled.stream("train")))
    with_label, without = labelled.to_sample(row), bare.to_sample(row)
    assert with_label.label is not None
    assert without.label is None
    assert (without.id, without.payload) == (with_label.id, with_label.payload)
    assert without.mask_key == with_label.mask_key
    assert [s.id for s in bare.index("test")] == [s.id for s in labelled.index("test")]
    assert all(sample.label is None for sample in bare.index("test"))
    assert bare.problem_type == NO_LABEL
    assert bare.fingerprint() == labelled.fingerprint()


def test_contrastive_training_takes_labelled_data():
    assert open_source(flags("contrastive")).problem_type == NO_LABEL
    assert open_source(flags("supervised")).problem_type == "single_label_classification"
