"""A short soak; the long one is a program of its own (`python -m tests.system.soak`)."""

import pytest

from tests.system import soak

pytestmark = [pytest.mark.distributed, pytest.mark.faults, pytest.mark.slow]


def test_a_troubled_run_ends_as_a_quiet_one(tmp_path):
    words = ["--steps", "60", "--save_steps", "10", "--kills", "3", "--preemptions", "1"]
    result = soak.main([*words, "--output", str(tmp_path / "soak")])
    assert result["equal"] == {
        "weights": True,
        "moments": True,
        "losses": True,
        "every_step_once": True,
    }
    assert result["lost_steps_max"] <= 10
    assert sum(result["blows"].values()) == 4
    assert result["damaged"]
