"""An evaluation borrows the rows that the run itself borrowed."""

import pytest
from transformers import TrainingArguments

from launch.evaluate_run import draw_seed


@pytest.mark.parametrize(("data_seed", "expected"), [(None, 7), (3, 3), (0, 0)])
def test_the_seed_of_the_draws_is_that_of_the_run(tmp_path, data_seed, expected):
    training = TrainingArguments(str(tmp_path), seed=7, data_seed=data_seed, use_cpu=True)
    assert draw_seed(training.to_sanitized_dict()) == expected  # as run.json holds it
