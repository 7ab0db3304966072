"""What counts as a spike: by hand, on Gaussian numbers, and after a change of level."""

from __future__ import annotations

import random

import pytest

from mm_moe.training.spikes import LEAST, SpikeWindow


def filled(sigma: float, values) -> SpikeWindow:
    window = SpikeWindow(sigma)
    for value in values:
        window.add(value)
    return window


def test_the_threshold_by_hand():
    # 0 and 10 in turn: median 5, every deviation 5, so the spread is 1.4826 * 5
    values = [0.0, 10.0] * 32
    assert filled(6.0, values).threshold == pytest.approx(5 + 6 * 7.413)  # 49.478
    assert not filled(6.0, values).add(49.0)
    assert filled(6.0, values).add(50.0)


def test_a_flat_stretch_has_the_least_spread():
    assert filled(6.0, [2.0] * LEAST).threshold == pytest.approx(2 + 6 * 0.02)


def test_nothing_is_a_spike_before_enough_is_known_or_if_not_asked():
    window = SpikeWindow(6.0)
    assert not any(window.add(10.0**n) for n in range(LEAST))
    assert not filled(0.0, [1.0] * 200).add(1e9)


@pytest.mark.parametrize(("sigma", "share"), [(6.0, 1e-9), (4.0, 3.2e-5), (3.0, 1.35e-3)])
def test_false_alarms_on_gaussian_steps(sigma, share):
    """`share` is the Gaussian's own tail; that the spread is estimated may double it."""
    numbers = random.Random(0)
    window, count = SpikeWindow(sigma), 10_000
    alarms = sum(window.add(numbers.gauss(2.0, 0.3)) for _ in range(count))
    assert alarms <= 2 * share * count + 1
    assert alarms > 0 or share * count < 1


def test_an_outlier_is_found_each_time_and_does_not_widen_the_window():
    numbers = random.Random(1)
    window = filled(6.0, (numbers.gauss(2.0, 0.3) for _ in range(128)))
    assert all(window.add(1e9) for _ in range(10))
    assert window.threshold < 6


def test_a_lasting_change_of_level_is_accepted():
    window = filled(6.0, [1.0, 1.1] * 64)
    found = [window.add(5.0) for _ in range(128)]
    assert (found[0], found[-1]) == (True, False)
    assert found.index(False) <= 66  # when the new level is half of the window
