"""The dial: what is drawn is what was asked for, and the truth explains every label."""

import numpy as np
import pytest

from mm_moe.data.interactions.categories import categorise
from mm_moe.data.sets.interaction_dial import CUES, MECHANISMS, InteractionDialData
from mm_moe.errors import ConfigError


def test_the_bits_say_what_the_mechanism_promises():
    shares = {"R": 1, "U_first": 1, "U_second": 1, "AS": 1, "xor": 1}
    source = InteractionDialData(shares=shares, sizes=(500, 1, 1))
    label_N, x_N2D, truth = source.arrays("train")
    mechanism_N, first_N, second_N = truth.T
    names = np.array(MECHANISMS)[mechanism_N]
    assert (first_N == label_N)[names == "R"].all()
    assert (second_N == label_N)[names == "R"].all()
    assert (first_N == label_N)[names == "U_first"].all()
    assert 0.3 < (second_N == label_N)[names == "U_first"].mean() < 0.7
    assert (second_N == label_N)[names == "U_second"].all()
    assert (first_N != label_N)[names == "AS"].all()
    assert (second_N != label_N)[names == "AS"].all()
    assert ((first_N ^ second_N) == label_N)[names == "xor"].all()
    assert x_N2D.shape == (500, 2, 16)
    assert x_N2D.dtype == np.float32


def test_a_modality_shows_its_bit_and_a_symbol_and_the_symbols_tell_the_mechanism():
    source = InteractionDialData(noise=0, sizes=(200, 1, 1))
    _, x_N2D, truth = source.arrays("train")
    seen_N2Q = np.einsum("nmd,mqd->nmq", x_N2D, source.directions)
    assert np.allclose(seen_N2Q[..., 0], 2 * truth[:, 1:] - 1, atol=1e-5)
    symbol_N2 = seen_N2Q[..., 1:].argmax(-1)
    assert np.allclose(seen_N2Q[..., 1:].sum(-1), 1, atol=1e-5)
    assert (symbol_N2.sum(1) % len(source.shares) == truth[:, 0]).all()
    # one symbol alone says nothing: each mechanism meets all of them
    for mechanism in range(4):
        assert len(set(symbol_N2[truth[:, 0] == mechanism, 0])) == 4
    assert source.directions.shape == (2, 1 + CUES, 16)


def test_categories_from_the_true_bits_are_the_mechanisms_where_these_differ():
    source = InteractionDialData(other="wrong", sizes=(300, 1, 1))
    label_N, _, truth = source.arrays("train")
    assert (categorise(truth[:, 1:].T, labels=label_N) == truth[:, 0]).all()


def test_weights_add_up_in_the_log_odds():
    alone = InteractionDialData(weights={"xor": 50}, sizes=(300, 1, 1))
    label_N, _, sign_N2 = alone.arrays("train")
    assert (label_N == (sign_N2.prod(1) > 0)).all()
    first = InteractionDialData(weights={"first": 50}, noise=0, sizes=(300, 1, 1))
    label_N, x_N2D, _ = first.arrays("train")
    score_N = x_N2D[:, 0] @ first.directions[0, 0]
    assert ((score_N > 0) == label_N).mean() > 0.95


def test_splits_differ_and_seeds_repeat():
    one, two = InteractionDialData(sizes=(9, 9, 9)), InteractionDialData(sizes=(9, 9, 9))
    for split in one.splits():
        assert np.array_equal(one.arrays(split)[1], two.arrays(split)[1])
    assert not np.array_equal(one.arrays("train")[1], one.arrays("test")[1])
    assert one.fingerprint() != InteractionDialData(sizes=(9, 9, 9), seed=1).fingerprint()
    sample = next(one.index("train"))
    assert (
        np.frombuffer(sample.payload["second"], "<f4").tolist()
        == one.arrays("train")[1][0][1].tolist()
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shares": {"AS": 1}, "weights": {"xor": 1}}, "not both"),
        ({"shares": {"S": 1}}, "knows no 'S'"),
        ({"weights": {"first": 0}}, "are 0"),
        ({"shares": {"R": -1}}, "not negative"),
        ({"other": "none"}, "random or wrong"),
        ({"width": 4}, "at least 9"),
        ({"sizes": (1, 2)}, "three numbers"),
        ({"noise": -1}, "noise"),
    ],
)
def test_options_that_cannot_work_say_so(options, message):
    with pytest.raises(ConfigError, match=message):
        InteractionDialData(**options)
