"""How the pretraining comparison reads its curves."""

import pytest

from eval.benchmarks.pretraining import gap_at_same_step, same_seed, steps_to_reach


def curve(*values: float) -> list[list[float]]:
    """A loss logged every ten steps."""
    return [[10 * (place + 1), value] for place, value in enumerate(values)]


def test_the_first_step_whose_mean_of_five_is_the_base_loss():
    base = curve(9.0, 4.0, 4.0, 4.0, 4.0, 4.0)  # ends with a mean of 4
    other = curve(8.0, 5.0, 4.0, 3.0, 3.0, 1.0, 1.0)  # means 4.6, 3.2, 2.4
    found = steps_to_reach(base, other)
    assert found == {"steps": 60, "share": 1.0, "base_loss": 4.0, "loss": pytest.approx(2.4)}


def test_the_share_is_of_the_steps_of_the_base():
    base = curve(*[4.0] * 10)
    assert steps_to_reach(base, curve(*[3.0] * 5))["share"] == 0.5


def test_a_loss_that_is_never_reached_has_no_step():
    found = steps_to_reach(curve(*[1.0] * 5), curve(*[2.0] * 5))
    assert found["steps"] is None
    assert found["share"] is None


def test_the_gap_is_that_of_the_last_step_of_both():
    found = gap_at_same_step(curve(*[3.0] * 9), curve(2.0, 2.0, 2.0, 2.0, 2.0, 7.0))
    assert found == {"step": 60, "gap": pytest.approx(0.0)}  # the mean of four 2 and a 7 is 3


def test_runs_are_compared_by_their_seed():
    left, right = [{"seed": 0}, {"seed": 1}], [{"seed": 1}, {"seed": 2}]
    assert same_seed(left, right) == [({"seed": 1}, {"seed": 1})]
