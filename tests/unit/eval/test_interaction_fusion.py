"""Fusion rules on numbers that a pencil can check. K experts, N samples, C classes."""

import numpy as np
import pytest
from numpy.testing import assert_allclose

from eval import interaction_fit, interaction_fusion
from eval.interaction_fusion import RULES, Experts, joined, mixture, softmax, without_reject
from mm_moe.errors import ConfigError, DataError

LN3 = np.log(3.0)  # softmax([0, LN3]) = [1/4, 3/4]


def experts(logits, *, gate=None, category=None, labels=None, reject=None, names=("R", "U", "AS")):
    logits = np.array(logits, dtype=float)
    return Experts(
        ids=tuple(map(str, range(logits.shape[1]))),
        names=names,
        logits=logits,
        labels=np.zeros(logits.shape[1], int) if labels is None else np.array(labels),
        reject=np.zeros(logits.shape[:2]) if reject is None else np.array(reject, dtype=float),
        gate=None if gate is None else np.array(gate, dtype=float),
        category=None if category is None else np.array(category),
        baselines={"baseline": np.zeros(logits.shape[1:])},
    )


# One sample: R says 1/4 3/4, U says 1/2 1/2, AS says 3/4 1/4.
ONE = [[[0.0, LN3]], [[0.0, 0.0]], [[LN3, 0.0]]]


def test_the_paper_s_rule_by_hand():
    # Weights softmax([ln 2, 0, 0]) = 1/2 1/4 1/4; p(1) = 3/8 + 1/8 + 1/16 = 9/16.
    said = interaction_fusion.rus(experts(ONE, gate=[[np.log(2), 0, 0]]))
    assert_allclose(said, [[7 / 16, 9 / 16]])


def test_the_reject_class_can_close_an_expert():
    # R is surely the wrong expert: 1/4 and 1/4 remain and become 1/2 each; p(1) = 1/4 + 1/8.
    given = experts(ONE, gate=[[np.log(2), 0, 0]], reject=[[1.0], [0.0], [0.0]])
    assert_allclose(interaction_fusion.rus_reject(given), [[5 / 8, 3 / 8]], atol=1e-9)
    assert_allclose(interaction_fusion.rus(given), [[7 / 16, 9 / 16]])


def test_rules_without_a_fuser_by_hand():
    given = experts(ONE)
    assert_allclose(RULES["mean_softmax"].apply(given), [[1 / 2, 1 / 2]])
    assert_allclose(RULES["mean_logits"].apply(given), [[1 / 2, 1 / 2]])
    assert_allclose(RULES["max_logits"].apply(given), [[1 / 2, 1 / 2]])
    tilted = experts([[[0.0, 4 * LN3]], [[0.0, 0.0]], [[0.0, 0.0]]])
    assert_allclose(RULES["max_logits"].apply(tilted), [[1 / 82, 81 / 82]])
    # With the baseline's zeros four models share 4 ln 3: a mean of ln 3.
    assert_allclose(RULES["mean_logits_all"].apply(tilted), [[1 / 4, 3 / 4]])


def test_weighted_logits_with_probabilities_and_with_raw_numbers():
    given = experts(ONE, gate=[[1.0, 1.0, -1.0]])
    # Raw: 1 * ln 3 for class 1, -1 * ln 3 for class 0: a difference of 2 ln 3.
    assert_allclose(RULES["weighted_logits_raw"].apply(given), [[1 / 10, 9 / 10]])
    # Softmax: (e - 1/e) / (2e + 1/e) = 0.40493 ln 3 in favour of class 1.
    said = RULES["weighted_logits"].apply(given)
    assert_allclose(np.log(said[0, 1] / said[0, 0]) / LN3, 0.404932, atol=1e-5)


@pytest.mark.parametrize(
    ("tau", "said"),
    [(0.70, [0.1, 0.9]), (0.80, [0.6, 0.4])],  # R 0.9 and U 0.75 are both sure; U no longer
)
def test_a_cascade_asks_the_last_expert_when_another_is_not_sure(tau, said):
    given = experts([[[0.0, np.log(9)]], [[LN3, 0.0]], [[np.log(1.5), 0.0]]])
    assert_allclose(interaction_fusion.cascaded(given, tau=tau), [said])


def test_a_cascade_needs_a_last_expert():
    with pytest.raises(ConfigError, match="needs an expert named 'AS'"):
        interaction_fusion.cascaded(experts(ONE, names=("R", "U", "DS")))


def test_hard_routing_and_the_oracle_choose_one_expert():
    two = [[row[0], row[0]] for row in ONE]
    given = experts(two, gate=[[0, 1, 3], [2, 1, 0]], category=[0, -1])
    assert_allclose(RULES["hard_routing"].apply(given), [[3 / 4, 1 / 4], [1 / 4, 3 / 4]])
    # The second sample has no category: the mean of the experts.
    assert_allclose(RULES["oracle"].apply(given), [[1 / 4, 3 / 4], [1 / 2, 1 / 2]])
    assert [name for name, rule in RULES.items() if rule.leaks] == ["oracle"]


def test_label_frequencies_of_categories():
    # R: labels 1 1 0, U: 0, AS: none; the last sample has no category.
    prior = interaction_fusion.label_frequencies(
        np.array([1, 1, 0, 0, 1]), np.array([0, 0, 0, 1, -1]), num_experts=3, num_classes=2
    )
    assert_allclose(prior, [[1 / 3, 2 / 3], [1, 0], [1 / 2, 1 / 2]])
    given = experts(ONE, gate=[[np.log(2), 0, 0]], category=[1])
    assert_allclose(interaction_fusion.subset_majority(given, prior_KC=prior), [[1, 0]])
    # 1/2 * 1/3 + 1/4 * 1 + 1/4 * 1/2
    said = interaction_fusion.category_prior(given, prior_KC=prior)
    assert_allclose(said[0, 0], 13 / 24)


def random_experts(*, seed=0, samples=40, classes=3):
    draw = np.random.default_rng(seed)
    return experts(
        draw.normal(size=(3, samples, classes)),
        gate=draw.normal(size=(samples, 3)),
        category=draw.integers(-1, 3, samples),
        labels=draw.integers(0, classes, samples),
        reject=draw.uniform(size=(3, samples)),
    )


@pytest.mark.parametrize("name", sorted(RULES))
@pytest.mark.parametrize("order", [(2, 0, 1), (1, 0, 2)])
def test_no_rule_depends_on_the_order_of_the_experts(name, order):
    given = random_experts()
    assert_allclose(RULES[name].apply(given.reordered(order)), RULES[name].apply(given))


@pytest.mark.parametrize("name", sorted(set(RULES) - {"mean_logits_all", "weighted_logits_raw"}))
def test_equal_experts_give_themselves(name):
    given = random_experts()
    same = experts(np.repeat(given.logits[:1], 3, axis=0), gate=given.gate, category=given.category)
    assert_allclose(RULES[name].apply(same), softmax(given.logits[0]))


def test_one_hot_weights_give_that_expert():
    probs = softmax(random_experts().logits)
    assert_allclose(mixture(probs, weights_NK=np.eye(3)[np.full(40, 1)]), probs[1])


def test_huge_logits_stay_finite():
    given = experts(np.array(ONE) * 1e6, gate=[[1e6, 0, -1e6]])
    for rule in RULES.values():
        if not rule.leaks:
            assert_allclose(rule.apply(given).sum(-1), 1)


@pytest.mark.parametrize(
    "weights", [np.full((40, 3), 0.5), np.full((40, 2), 0.5), np.tile([2, -1, 0], (40, 1))]
)
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ConfigError, match=r"sum to 1|do not fit"):
        mixture(softmax(random_experts().logits), weights_NK=weights)


def test_a_third_logit_is_dropped_and_the_rest_renormalised():
    logits, reject = without_reject(np.log([[1.0, 3.0, 4.0]]), num_classes=2)
    assert_allclose(softmax(logits), [[1 / 4, 3 / 4]])
    assert_allclose(reject, [1 / 2])
    assert without_reject(np.zeros((1, 2)), num_classes=2)[1].tolist() == [0]
    with pytest.raises(DataError, match="has 4 logits for 2 classes"):
        without_reject(np.zeros((1, 4)), num_classes=2)


def test_ids_are_joined_and_what_is_missing_is_named():
    parts = {"R": {"b": 2.0, "a": 1.0}, "fuser": {"a": 3.0, "b": 4.0}}
    found = joined(parts, order=["a", "b"])
    assert {name: values.tolist() for name, values in found.items()} == {
        "R": [1, 2],
        "fuser": [3, 4],
    }
    with pytest.raises(DataError, match=r"fuser lacks 1 of the ids \(3 are scored\): 'c'"):
        joined({"fuser": parts["fuser"]}, order=["a", "b", "c"])
    with pytest.raises(DataError, match=r"R has also 1 of the ids.*'b'"):
        joined({"R": parts["R"]}, order=["a"])
    with pytest.raises(DataError, match="twice: 'a'"):
        joined(parts, order=["a", "b", "a"])


def test_a_gate_learns_which_expert_to_trust():
    # Class 1 is right where the fuser's first logit is high; expert R says 1, U says 0.
    draw = np.random.default_rng(0)
    side = draw.integers(0, 2, 400)
    given = experts(
        [np.tile([-2.0, 2.0], (400, 1)), np.tile([2.0, -2.0], (400, 1)), np.zeros((400, 2))],
        gate=np.stack([side, 1 - side, np.zeros(400)], axis=1),
        labels=side,
    )
    gate = interaction_fit.LearnedGate.fit(given)
    assert (gate.apply(given).argmax(-1) == side).mean() == 1
    weights = gate.weights(given)
    assert weights[side == 1, 0].min() > 0.9
    assert weights[side == 0, 1].min() > 0.9
    # The loss falls from that of equal weights.
    lost = [
        -np.log(said[np.arange(400), side]).mean()
        for said in (gate.apply(given), RULES["mean_softmax"].apply(given))
    ]
    assert lost[0] < 0.5 * lost[1]


def test_stacking_turns_an_expert_that_is_always_wrong():
    labels = np.arange(60) % 2
    wrong = np.where(labels[:, None] == [0, 1], -1.0, 1.0)
    given = experts([wrong, 0 * wrong, 0 * wrong], labels=labels)
    stacked = interaction_fit.Stacking.fit(given)
    assert (stacked.apply(given).argmax(-1) == labels).all()


def test_fitting_needs_samples_of_two_classes():
    with pytest.raises(DataError, match="all have one class"):
        interaction_fit.Stacking.fit(experts(ONE))
    with pytest.raises(DataError, match="no validation sample"):
        interaction_fit.LearnedGate.fit(experts(np.zeros((3, 0, 2)), gate=np.zeros((0, 3))))
