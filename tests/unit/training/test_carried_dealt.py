"""Sums between two logs, dealt out to another number of ranks: the next line stays the same."""

from types import SimpleNamespace

import pytest
import torch

from mm_moe.training.carried import LibrarySums
from mm_moe.training.meter import Meter


def trainer(loss: float = 0.0, flos: float = 0.0):
    return SimpleNamespace(
        _tr_loss=torch.tensor(loss),
        _globalstep_last_logged=4,
        current_flos=flos,
        args=SimpleNamespace(device="cpu"),
    )


def dealt(part, states, world_size: int) -> list:
    return [part.dealt(states, rank=rank, world_size=world_size) for rank in range(world_size)]


@pytest.mark.parametrize("world_size", [1, 4])
def test_the_library_sums(world_size):
    states = [LibrarySums(trainer(*values)).state_dict() for values in ((1.0, 10.0), (2.0, 30.0))]
    ranks = [trainer() for _ in range(world_size)]
    for one, state in zip(ranks, dealt(LibrarySums(ranks[0]), states, world_size), strict=True):
        LibrarySums(one).load_state_dict(state)
    # logged is the mean over ranks, (1 + 2) / 2, and the sum of operations, 10 + 30
    assert sum(one._tr_loss.item() for one in ranks) / world_size == 1.5
    assert sum(one.current_flos for one in ranks) == 40.0
    assert {one._globalstep_last_logged for one in ranks} == {4}


@pytest.mark.parametrize("world_size", [1, 4])
def test_the_meter(world_size):
    states = []
    for loss, rows in ((1.0, [1, 2]), (3.0, [0, 5])):
        meter = Meter()
        routing = {"text.0": SimpleNamespace(tokens_E=torch.tensor(rows), metrics={})}
        meter.add({"balance": torch.tensor(loss)}, routing)
        meter.total_load["text.0"] = torch.tensor([7, 7])
        states.append(meter.state_dict())
    ranks = [Meter() for _ in range(world_size)]
    for meter, state in zip(ranks, dealt(Meter(), states, world_size), strict=True):
        meter.load_state_dict(state)
    again = [meter.state_dict() for meter in ranks]
    assert sum(state["load"]["text.0"] for state in again).tolist() == [1, 7]
    assert sum(state["parts"]["balance"] for state in again) / world_size == 2.0
    assert {state["calls"] for state in again} == {1}
    assert again[0]["total_load"]["text.0"].tolist() == [7, 7]
