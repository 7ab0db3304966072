"""Fills are told of every optimizer step."""

from types import SimpleNamespace

from torch import nn

from mm_moe.fill.base import FillShape
from mm_moe.fill.simple import DefaultFill
from mm_moe.training.fill_steps import FillWarmUp


def test_the_step_that_training_is_at_is_written_into_the_fills():
    shape = FillShape(("a", "b"), 1, 2)
    model = nn.ModuleDict({"fill": DefaultFill(shape, warm_up_steps=3), "none": nn.Identity()})
    warm_up = FillWarmUp(model)
    for step in (1, 4):
        warm_up.on_step_end(None, SimpleNamespace(global_step=step), None)
        assert model.state_dict()["fill.steps_done"].tolist() == [step]
    FillWarmUp(DefaultFill(shape)).on_step_end(None, SimpleNamespace(global_step=1), None)
