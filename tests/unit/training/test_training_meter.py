"""What a training log says of two forward passes, by hand."""

import pytest
import torch

from mm_moe.moe.layer import RoutingRecord
from mm_moe.training import meter as meter_module
from mm_moe.training.meter import Meter


def record(tokens: list[int], entropy: float) -> RoutingRecord:
    metrics = {"router_entropy": torch.tensor(entropy), "tokens": torch.tensor(float(sum(tokens)))}
    return RoutingRecord(torch.tensor(tokens), {}, metrics)


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets."""
    now = [10.0]
    monkeypatch.setattr(meter_module.time, "perf_counter", lambda: now[0])
    return now


def test_means_loads_and_speed_of_two_passes(clock):
    meter = Meter()
    meter.add(
        {"task": torch.tensor(1.0), "load_balance": torch.tensor(0.5)},
        {"image.1": record([6, 0], 0.2), "image.3": record([1, 1], 0.6)},
        rows=3,
    )
    meter.add(
        {"task": torch.tensor(3.0, requires_grad=True), "load_balance": torch.tensor(0.0)},
        {"image.1": record([0, 2], 0.4), "image.3": record([2, 2], 0.0)},
        rows=5,
    )
    clock[0] += 2.0
    assert meter.summary() == pytest.approx(
        {
            "loss/task": 2.0,
            "loss/load_balance": 0.25,
            "moe/image.1/router_entropy": 0.25,  # (6 * .2 + 2 * .4) / 8
            "moe/image.1/tokens": 8,
            "moe/image.1/expert_0": 6,
            "moe/image.1/expert_1": 2,
            "moe/image.1/load_imbalance": 1.5,  # 6 / 4
            "moe/image.3/router_entropy": 0.2,  # (2 * .6 + 4 * 0) / 6
            "moe/image.3/tokens": 6,
            "moe/image.3/expert_0": 3,
            "moe/image.3/expert_1": 3,
            "moe/image.3/load_imbalance": 1.0,
            "moe/image/router_entropy": 0.225,
            "moe/image/tokens": 7,
            "moe/image/load_imbalance": 1.25,
            "moe/load_imbalance": 1.5,
            "perf/samples_per_second": 4.0,
        }
    )


def test_a_summary_starts_a_new_interval_and_the_total_load_goes_on(clock):
    meter = Meter()
    for tokens in ([3, 1], [0, 4]):
        meter.add({"task": torch.tensor(1.0)}, {"image.1": record(tokens, 0.0)}, rows=2)
        clock[0] += 1.0
        logs = meter.summary()
    assert logs["moe/image.1/load_imbalance"] == 2.0
    assert logs["perf/samples_per_second"] == 2.0
    assert meter.total_load["image.1"].tolist() == [3, 5]


def test_ranks_are_summed(clock, monkeypatch):
    """Two ranks that differ: means over ranks, rows and loads added."""
    other = ({"task": 5.0}, {"image.1": torch.tensor([0, 9])}, 1, 6)
    monkeypatch.setattr(meter_module, "gather_objects", lambda mine: [mine, other])
    monkeypatch.setattr(meter_module, "world_size", lambda: 2)
    meter = Meter()
    meter.add(
        {"task": torch.tensor(1.0)},
        {"image.1": RoutingRecord(torch.tensor([3, 0]), {}, {})},
        rows=2,
    )
    clock[0] += 4.0
    assert meter.summary() == pytest.approx(
        {
            "loss/task": 3.0,
            "moe/image.1/expert_0": 3,
            "moe/image.1/expert_1": 9,
            "moe/image.1/load_imbalance": 1.5,  # 3 and 9 rows: 9 / 6
            "moe/image/load_imbalance": 1.5,
            "moe/load_imbalance": 1.5,
            "perf/samples_per_second": 2.0,
        }
    )


def test_no_sparse_layer_and_no_token_are_legal(clock):
    meter = Meter()
    meter.add({"task": torch.tensor(1.0)}, {}, rows=1)
    clock[0] += 1.0
    assert set(meter.summary()) == {"loss/task", "perf/samples_per_second"}
    meter.add({"task": torch.tensor(1.0)}, {"image.1": record([0, 0], 0.0)}, rows=0)
    assert meter.summary()["moe/image.1/load_imbalance"] == 0.0
