"""The interaction benchmark's own arithmetic, and one fit that has to learn."""

import numpy as np
import pytest
import torch

from eval.benchmarks.interactions import by_mechanism, codes_of, compare, identifiable
from eval.benchmarks.interactions_fit import Split, config_of, fit, mistakes, new_model
from mm_moe.data.sets.interaction_dial import InteractionDialData

torch.set_num_threads(1)


def test_uniqueness_whose_other_bit_is_right_too_cannot_be_told_from_redundancy():
    # mechanism, bits: R; U_first with the second bit right, and wrong; AS; xor
    truth = np.array([[0, 1, 1], [1, 1, 1], [1, 1, 0], [3, 0, 0], [4, 1, 0]])
    found = identifiable(truth, np.ones(5, dtype=int))
    assert found.tolist() == [True, False, True, True, False]


def test_accuracy_by_mechanism_and_paired_differences_by_hand():
    truth = np.array([[0, 1, 1], [0, 1, 1], [3, 0, 0]])
    split = Split(torch.tensor([1, 1, 1]), torch.zeros(3, 2, 9), truth)
    prob = torch.tensor([[0.2, 0.8], [0.9, 0.1], [0.4, 0.6]])
    assert by_mechanism(prob, split) == pytest.approx({"all": 2 / 3, "R": 0.5, "AS": 1.0})
    rows = [{"scores": {"a": {"AS": a}, "b": {"AS": 0.5}}} for a in (0.6, 0.5, 0.7)]
    found = compare(rows, "a", "b", "AS")
    assert found == {"mean": 10.0, "std": 10.0, "ahead": 2, "seeds": 3}


def test_easy_data_are_categorised_and_learnt():
    options = {"shares": {"R": 4, "AS": 1}, "noise": 0.05, "sizes": (300, 50, 50)}
    source = InteractionDialData(**options)
    splits = {split: Split.of(source, split) for split in source.splits()}
    codes = codes_of(splits)
    assert (codes["test"] == splits["test"].truth[:, 0]).mean() > 0.95
    model = new_model(config_of(source, interaction_experts={"hidden": 16}), seed=0)
    fit(model, splits, epochs=16, seed=0, kind_N=torch.from_numpy(codes["train"]))
    assert mistakes(model, splits["test"])[0] < 0.1
