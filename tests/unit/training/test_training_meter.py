"""What a training log says of two forward passes, by hand."""

from dataclasses import replace

import pytest
import torch

from mm_moe.moe.layer import RoutingRecord
from mm_moe.training import meter as meter_module
from mm_moe.training.meter import Meter
from mm_moe.training.throughput import Peak, Sums


def record(tokens: list[int], entropy: float) -> RoutingRecord:
    metrics = {"router_entropy": torch.tensor(entropy), "tokens": torch.tensor(float(sum(tokens)))}
    return RoutingRecord(torch.tensor(tokens), {}, metrics)


def speed(*, rows: int, busy_s: float = 2.0) -> Sums:
    return Sums(4, busy_s, 0.5, rows, 40.0, 6e9, int(3e9), Peak(1e10, known=False))


# of the sums above, with 8 rows: 6e9 operations in 2 s of 1e10 per second
RATES = {
    "perf/samples_per_second": 4.0,
    "perf/samples_per_second_per_gpu": 4.0,
    "perf/tokens_per_second": 20.0,
    "perf/matmul_share": 0.3,
    "perf/data_wait_share": 0.25,
    "perf/step_time_s": 0.5,
    "perf/memory_gb": 3.0,
}


def test_means_loads_and_speed_of_two_passes():
    meter = Meter()
    meter.add(
        {"task": torch.tensor(1.0), "load_balance": torch.tensor(0.5)},
        {"image.1": record([6, 0], 0.2), "image.3": record([1, 1], 0.6)},
    )
    meter.add(
        {"task": torch.tensor(3.0, requires_grad=True), "load_balance": torch.tensor(0.0)},
        {"image.1": record([0, 2], 0.4), "image.3": record([2, 2], 0.0)},
    )
    assert meter.summary(speed(rows=8)) == pytest.approx(
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
            **RATES,
        }
    )


def test_a_summary_starts_a_new_interval_and_the_total_load_goes_on():
    meter = Meter()
    for tokens in ([3, 1], [0, 4]):
        meter.add({"task": torch.tensor(1.0)}, {"image.1": record(tokens, 0.0)})
        logs = meter.summary(speed(rows=2, busy_s=1.0))
    assert logs["moe/image.1/load_imbalance"] == 2.0
    assert logs["perf/samples_per_second"] == 2.0
    assert meter.total_load["image.1"].tolist() == [3, 5]


def test_ranks_are_summed(monkeypatch):
    """Two ranks that differ: means over ranks, rows and loads added."""
    other = ({"task": 5.0}, {"image.1": torch.tensor([0, 9])}, 1, speed(rows=6, busy_s=4.0))
    monkeypatch.setattr(meter_module, "gather_objects", lambda mine: [mine, other])
    monkeypatch.setattr(meter_module, "world_size", lambda: 2)
    meter = Meter()
    meter.add(
        {"task": torch.tensor(1.0)},
        {"image.1": RoutingRecord(torch.tensor([3, 0]), {}, {})},
    )
    assert meter.summary(speed(rows=2)) == pytest.approx(
        {
            "loss/task": 3.0,
            "moe/image.1/expert_0": 3,
            "moe/image.1/expert_1": 9,
            "moe/image.1/load_imbalance": 1.5,  # 3 and 9 rows: 9 / 6
            "moe/image/load_imbalance": 1.5,
            "moe/load_imbalance": 1.5,
            # the slower rank took 4 s for 2 + 6 rows and 80 tokens; 12e9 operations of 4 s x 2e10
            "perf/samples_per_second": 2.0,
            "perf/samples_per_second_per_gpu": 1.0,
            "perf/tokens_per_second": 20.0,
            "perf/matmul_share": 0.15,
            "perf/data_wait_share": 0.25,  # of the rank that waits for more of its time
            "perf/step_time_s": 1.0,
            "perf/memory_gb": 3.0,
        }
    )


def test_no_sparse_layer_and_no_token_are_legal():
    meter = Meter()
    meter.add({"task": torch.tensor(1.0)}, {})
    idle = replace(speed(rows=0), steps=0)
    assert set(meter.summary(idle)) == {"loss/task", "perf/memory_gb"}
    meter.add({"task": torch.tensor(1.0)}, {"image.1": record([0, 0], 0.0)})
    assert meter.summary(idle)["moe/image.1/load_imbalance"] == 0.0
