"""The truth table, its continuation to more classes and modalities, and the soft weights."""

import numpy as np
import pytest

from mm_moe.data.interactions.categories import (
    NONE,
    categorise,
    category_names,
    coarse_codes,
    coarse_weights,
    soft_categories,
)
from mm_moe.errors import DataError

NAMES = category_names(("text", "image"))


def names_of(t, v, y, modalities=("text", "image")):
    codes = categorise([np.array(t), np.array(v)], labels=np.array(y))
    return ["none" if code == NONE else category_names(modalities)[code] for code in codes]


def test_the_published_truth_table():
    t, v, y = zip(*[(t, v, y) for t in (0, 1) for v in (0, 1) for y in (0, 1)], strict=True)
    assert names_of(t, v, y) == [
        *("R", "AS"),  # 0 0 -> right, wrong
        *("U_text", "U_image"),  # 0 1
        *("U_image", "U_text"),  # 1 0
        *("AS", "R"),  # 1 1
    ]


@pytest.mark.parametrize(
    ("counts", "expected"),
    [  # cells (t, v, y) of the released files and their class sizes R, U, AS
        ((6, 2, 157, 74, 2, 0, 39, 76), (82, 233, 41)),
        ((4, 0, 20, 10, 4, 5, 11, 29), (33, 39, 11)),
        ((13, 6, 46, 37, 11, 21, 32, 85), (98, 115, 38)),
        ((76, 45, 355, 204, 10, 40, 61, 201), (277, 609, 106)),
        ((65, 38, 365, 201, 14, 38, 42, 217), (282, 618, 80)),
    ],
)
def test_cells_of_the_released_files(counts, expected):
    cells = np.repeat(np.arange(8), counts)
    codes = categorise([cells >> 2, cells >> 1 & 1], labels=cells & 1)
    found = np.bincount(coarse_codes(codes, num_modalities=2), minlength=4)
    assert tuple(found) == (*expected, 0)  # two classes cannot disagree and both be wrong


def test_more_classes_have_disagreement_synergy():
    assert names_of([2, 2, 0, 1, 0], [2, 2, 1, 2, 1], [2, 1, 0, 2, 2]) == [
        *("R", "AS", "U_text", "U_image", "DS")
    ]


def test_three_modalities_name_the_set_that_is_right():
    parts = np.array([[1, 1, 0, 0, 0], [1, 1, 1, 0, 1], [1, 0, 1, 0, 2]])
    codes = categorise(parts, labels=np.array([1, 1, 1, 1, 3]))
    names = category_names(("a", "b", "c"))
    assert [names[code] for code in codes] == ["R", "U_a+b", "U_b+c", "AS", "DS"]
    assert coarse_codes(codes, num_modalities=3).tolist() == [0, 1, 1, 2, 3]
    assert len(names) == 9


def test_missing_predictions_have_no_category():
    assert names_of([0, NONE, 0], [NONE, 1, 0], [0, 1, NONE]) == ["none"] * 3
    assert coarse_codes(np.array([NONE]), num_modalities=2).tolist() == [NONE]


def test_soft_weights_by_hand():
    text, image = np.array([[0.2, 0.8]]), np.array([[0.4, 0.6]])
    soft = soft_categories([text, image], labels=np.array([1]))
    # both right .8 x .6, text alone .8 x .4, image alone .2 x .6, both wrong .2 x .4
    assert soft[0] == pytest.approx([0.48, 0.32, 0.12, 0.08, 0.0])
    assert coarse_weights(soft)[0] == pytest.approx([0.48, 0.44, 0.08, 0.0])


def test_soft_weights_are_the_chances_of_the_hard_categories():
    rng = np.random.default_rng(0)
    prob = rng.dirichlet(np.ones(3), size=(3, 4))  # 3 modalities, 4 samples, 3 classes
    labels = np.array([0, 1, 2, 1])
    expected = np.zeros((4, 9))
    for draw in np.ndindex(3, 3, 3):
        codes = categorise([np.full(4, d) for d in draw], labels=labels)
        chance = np.prod([prob[m, :, d] for m, d in enumerate(draw)], axis=0)
        expected[np.arange(4), codes] += chance
    assert soft_categories(prob, labels=labels) == pytest.approx(expected)
    sure = np.eye(3)[rng.integers(0, 3, (3, 4))]
    hard = categorise(sure.argmax(-1), labels=labels)
    assert soft_categories(sure, labels=labels).argmax(-1).tolist() == hard.tolist()
    assert np.isnan(soft_categories(prob * np.nan, labels=labels)).all()


def test_parts_that_do_not_fit():
    with pytest.raises(DataError, match="1 modalities"):
        categorise([np.array([0])], labels=np.array([0]))
    with pytest.raises(DataError, match=r"lengths \[1, 2\]"):
        categorise([np.array([0]), np.array([0])], labels=np.array([0, 1]))
