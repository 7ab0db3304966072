"""The planner's arithmetic, checked with a pencil."""

import numpy as np
import pytest
from torch import nn

from mm_moe.moe.layer import MoELayer
from mm_moe.moe.settings import MoESettings
from mm_moe.training import exchange
from mm_moe.training.estimate import (
    ParameterCount,
    build_bytes,
    count_parameters,
    largest_micro_batch,
    peak_memory,
    rows_of,
)
from mm_moe.training.exchange import Links, Traffic
from mm_moe.training.timeline import Timeline
from mm_moe.training.zero_memory import Group, Slot, ZeroSettings, overlay

# ---- groups and partitions -------------------------------------------------------------------

SLOTS = (Slot("a", 10, 0), Slot("b", 3, 10), Slot("c", 6, 13))


def test_a_group_is_padded_and_split():
    group = Group(SLOTS, expert=False, ranks=2)
    # 19 elements, padded to a multiple of 2 * 2
    assert (group.size, group.padded, group.partition) == (19, 20, 10)
    assert group.parts(SLOTS[0]) == [(0, 10)]
    four = Group(SLOTS, expert=False, ranks=4)
    assert four.partition == 6  # 24 / 4
    assert four.parts(SLOTS[0]) == [(0, 6), (1, 4)]
    assert four.parts(SLOTS[1]) == [(1, 2), (2, 1)]
    assert four.parts(SLOTS[2]) == [(2, 5), (3, 1)]
    # partition 1 touches a and b, whole: 13 elements; 0 only a, 2 b and c: 9
    assert four.worst_part() == 1


def of(zero: ZeroSettings, group: Group, moments: int = 4):
    marks = [(0, ""), (1, "c"), (2, "b"), (3, "a")]
    return overlay([group], zero=zero, frozen_bytes=100, marks=marks, moments=moments)


def test_stage_0_keeps_gradients_and_two_moments():
    over = of(ZeroSettings(0), Group(SLOTS, False, 1))
    assert (over.weights, over.optimizer, over.host) == (100 + 4 * 19, 8 * 19, 0)
    # a gradient is the pass' own until its mark is over: c 24, then b 12
    assert over.gradients_V.tolist() == [0, 0, 24, 36]
    # reduced through a flat copy of all; the clip squares the largest, a
    assert over.after == [(76, 76), (76, 40)]


def test_stage_2_reduces_full_buckets_and_keeps_its_part():
    zero = ZeroSettings(2, world_size=2, half=True, reduce_bucket_size=9)
    over = of(zero, Group(SLOTS, False, 2))
    assert over.weights == 100 + 2 * 20
    assert over.optimizer == 12 * 10
    # The bucket holds c (6) and b (3); a (10) is larger than a bucket and stays outside it. When a
    # comes, the bucket is reduced: all of it is part 1, one slice, no copy. The worst part is 0
    # (a, 10 elements), and a's gradient is kept only when it is reduced itself, at the end.
    assert over.buffers_V.tolist() == [0, 18, 18, 18]
    assert over.gradients_V.tolist() == [0, 0, 0, 0]
    assert over.after[0] == (20 + 20, 18)  # a's own tensor and its copy in the partition
    # the step: 10 elements flat in bf16 and again in float32; norms in float64
    assert over.after[1:] == [(20, 20 + 40), (20, 80)]


def test_stage_1_reduces_at_the_end():
    over = of(ZeroSettings(1, world_size=4, reduce_bucket_size=100), Group(SLOTS, False, 4))
    assert over.gradients_V.tolist() == [0, 0, 24, 36]
    assert over.buffers_V.tolist() == [0, 400, 400, 400]
    # gradients go into the bucket one after the other: 76, 36, 24 bytes are left
    assert over.after[:3] == [(76, 400), (36, 400), (24, 400)]
    # every gradient goes to several parts, so all 19 elements are copied (76); then a and b are
    # kept whole (52). The copy is gone by then: 76 at most, which is 24 more.
    assert over.after[3] == (52, 400 + 24)
    # the step: a part of 6 elements, flat, and its largest piece in float64
    assert over.after[4:] == [(52, 24), (52, 48)]


def test_offloaded_state_is_on_the_host():
    zero = ZeroSettings(2, offload=True, reduce_bucket_size=100)
    over = of(zero, Group(SLOTS, False, 1))
    # padded to 20: weights, gradient, two moments and the way back; the largest gradient twice
    assert over.host == 5 * 4 * 20 + 40
    assert over.optimizer == 40
    assert over.gradients_V.tolist() == [0] * 4


def test_the_moment_that_needs_most():
    table = np.array([[0.0, 0, 0, 0], [0, 10, 30, 20]])  # 10, 30, 20 bytes per sample
    timeline = Timeline((), table, np.array([5.0, 0]), np.array([0.0, 7]))
    over = of(ZeroSettings(0), Group(SLOTS, False, 1))
    small = peak_memory(timeline, over, samples=1, rows={})
    # 0, 10, 30 + 24, 20 + 36 in the pass; 5 + 76 + 76 at its end
    assert (small.when, small.device) == ("step", 176 - 0 + 152 + 157)
    large = peak_memory(timeline, over, samples=100, rows={})
    assert (large.when, large.activations, large.gradients) == ("forward and backward", 3000, 24)
    assert timeline.flops(3, {}) == 21


# ---- counts ----------------------------------------------------------------------------------


def test_parameters_by_part():
    model = nn.Module()
    model.backbone = nn.Module()
    model.backbone.towers = nn.ModuleDict(
        {"text": MoELayer(width=2, hidden=3, settings=MoESettings(num_experts=4, top_k=2))}
    )
    model.head = nn.Linear(2, 5).requires_grad_(False)
    counts = count_parameters(model)
    # an expert: 2 * 3 + 3 + 3 * 2 + 2 = 17; the router: 4 * 2
    assert counts["text"] == ParameterCount(dense=8, expert=68, active=42, trainable=76)
    assert counts["head"] == ParameterCount(dense=15, expert=0, active=15, trainable=0)
    assert build_bytes(counts, ep_size=2) == 4 * (91 + 34)


def test_rows_that_chance_gives():
    assert rows_of(64, {"image": 0.0, "text": 0.0}, ratio=0) == {"image": 64, "text": 64}
    # 32 +- 4 lack something: at least 20 of them, half each
    assert rows_of(64, {"image": 0.25, "text": 0.25}, ratio=0.5) == {"image": 54, "text": 54}
    assert rows_of(64, {"image": 0.0, "text": 1.0}, ratio=1) == {"image": 64, "text": 1}


def test_the_largest_batch_that_fits():
    assert largest_micro_batch(lambda n: 10 + 3 * n, available=100) == 30
    assert largest_micro_batch(lambda n: 10 + 3 * n, available=12) == 0
    assert largest_micro_batch(lambda n: n, available=10**9, limit=50) == 50


# ---- exchange --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ep_size", "near", "far"),
    [(1, 0, 0), (4, 12, 0), (8, 14, 0), (16, 7, 8)],
)
def test_all_to_all_on_and_off_the_node(ep_size, near, far):
    found = exchange.all_to_all(16.0, ep_size=ep_size, gpus_per_node=8)
    assert (found.near, found.far) == (near, far)


def test_all_reduce_within_nodes_first():
    # 16 processes on 2 nodes: 2 * 15/16 in all; each node sends 2 * 1/2, shared by its 8 processes
    found = exchange.all_reduce(16.0, ranks=16, stride=1, gpus_per_node=8)
    assert (found.near, found.far) == (28.0, 2.0)
    # the same expert on 2 nodes: nothing of its group is near
    found = exchange.all_reduce(16.0, ranks=2, stride=8, gpus_per_node=8)
    assert (found.near, found.far) == (0.0, 16.0)
    assert exchange.all_gather(16.0, ranks=1, stride=1, gpus_per_node=8) == Traffic()


def test_expert_rows_travel_four_times():
    layers = [exchange.SparseLayer(tokens=100, width=8, hidden=32, top_k=2)]
    zero = ZeroSettings(2, world_size=4, ep_size=4, half=True, accumulation=3)
    found = exchange.expert_traffic(layers, zero=zero, gpus_per_node=4, imbalance=1.5)
    # 2 * 100 * 8 values, 2 bytes, 4 ways, 3 micro-batches, 1.5 times; a quarter stays here
    assert found == Traffic(2 * 100 * 8 * 2 * 4 * 3 * 1.5 * 3 / 4, 0.0)


def test_stage_2_reduces_after_every_micro_batch():
    group = Group((Slot("a", 8, 0),), expert=True, ranks=2)
    for stage, times in ((1, 1), (2, 3)):
        zero = ZeroSettings(stage, world_size=4, ep_size=2, accumulation=3)
        found = exchange.gradient_traffic([group], zero=zero, gpus_per_node=4)
        assert found["expert gradients"] == Traffic(8 * 4 * times, 0.0)
        weights = exchange.weight_traffic([group], zero=zero, gpus_per_node=4)
        assert weights == Traffic(16.0, 0.0)


def test_balance_points_of_the_literature():
    """H100, NVLink, 8 processes: about 1.9k; 16 over two nodes at 400 Gb/s: about 9.9k off node."""
    one = {"gpus_per_node": 8, "peak": 989e12, "element": 2}
    assert exchange.balance_width(ep_size=8, links=Links(), **one) == pytest.approx(1923, rel=1e-3)
    far = exchange.balance_width(ep_size=16, links=Links(near=float("inf")), **one)
    assert far == pytest.approx(9890, rel=1e-3)


def test_lower_bounds_of_a_step():
    bound = exchange.step_time(
        {"x": Traffic(near=4.0, far=2.0)}, flops=30.0, peak=10.0, links=Links(near=2.0, far=1.0)
    )
    assert (bound.compute, bound.exchange, bound.overlapped, bound.serial) == (3, 4, 4, 7)
    assert bound.ratio == pytest.approx(4 / 3)
