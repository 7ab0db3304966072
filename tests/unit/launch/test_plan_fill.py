"""What the planner says of fills: rows by hand, and bytes against those of a real pass."""

import pytest
import torch

from eval.benchmarks.peak_memory import PeakMemory
from launch.plan_fill import FillPlan
from mm_moe.fill.base import FillShape, SupportTokens
from mm_moe.registry import FILLS
from mm_moe.training.planned import Workload

NAMES = ("a", "b", "c")
LOAD = Workload(
    text_tokens=0,
    real_text_tokens=0.0,
    image_size=0,
    outputs=2,
    problem_type="single_label_classification",
)
SHAPE = FillShape(NAMES, 2, 16)


def plan_of(name, present, *, train_rows=1000, **options):
    def build():
        with torch.device("meta"):
            return FILLS.resolve(name)(SHAPE, **options)

    return FillPlan(
        build, torch.tensor(present, dtype=torch.bool), train_rows=train_rows, load=LOAD
    )


def test_rows_by_hand():
    # every sample lacks "a" alone: no spread, and two modalities of its own
    plan = plan_of("retriever", [[0, 1, 1]] * 4, legacy=True)
    assert plan.cells(10) == {"a": 10, "b": 0, "c": 0}
    assert plan.supports(10) == {"a": 20, "b": 0, "c": 0}
    assert plan.rows(10, dict.fromkeys(NAMES, 9)) == {"a": 21, "b": 10, "c": 10}
    few = plan_of("retriever", [[0, 1, 1]] * 4, legacy=True, train_rows=7, num_supports=5)
    assert few.supports(10) == {"a": 7, "b": 0, "c": 0}


def test_half_is_missing_where_nobody_says_how_much():
    plan = plan_of("retriever", [[1, 1, 1]] * 4, legacy=True, num_supports=2)
    assert plan.cells(10) == dict.fromkeys(NAMES, 5)
    assert plan.supports(10) == dict.fromkeys(NAMES, 10)


def test_rows_that_come_whole_are_encoded_everywhere():
    plan = plan_of("neighbour", [[0, 1, 1]] * 4, num_supports=2)
    assert plan.supports(10) == {"a": 20, "b": 20, "c": 20}


def test_a_fill_without_supports_adds_no_row():
    plan = plan_of("bank", [[0, 1, 1]] * 4)
    assert plan.rows(10, {"a": 3, "b": 9, "c": 9}) == {"a": 3, "b": 9, "c": 9}
    assert 0 < plan.bytes(10) < plan.bytes(100)


@pytest.mark.slow  # recordings of many experts
@pytest.mark.parametrize("name", ["retriever", "similar_retriever", "neighbour"])
def test_bytes_are_those_of_a_real_pass(name):
    more = {} if name == "neighbour" else {"num_candidates": 2, "dropout": 0.1}
    samples, lent = 64, 4
    plan = plan_of(name, [[0, 1, 1]] * 4, num_supports=lent, **more)
    fill = FILLS.resolve(name)(SHAPE, num_supports=lent, **more).train()
    present = torch.tensor([[0, 1, 1]] * samples, dtype=torch.bool)
    count = samples * lent
    tokens = {n: torch.randn(samples, 2, 16, requires_grad=True) for n in NAMES}
    supports = {
        n: SupportTokens(
            torch.randn(count, 2, 16, requires_grad=True),
            torch.arange(count).view(samples, lent) if n == "a" else torch.zeros(0, lent).long(),
            torch.ones(count, 3, dtype=torch.bool),
            torch.arange(count),
        )
        for n in (NAMES if name != "retriever" else NAMES[:1])
    }
    with PeakMemory() as meter:
        filled = fill(tokens, present, supports)
        (sum(x.sum() for x in filled.tokens.values()) + sum(filled.losses.values())).backward()
    parameters = sum(4 * p.numel() for p in fill.parameters())
    features = sum(plan.supports(samples).values()) * 3 * 2 * 16 * 4  # the towers', not seen here
    estimated = plan.bytes(samples) - features
    assert 0.6 < estimated / (meter.peak - parameters) < 1.7, (estimated, meter.peak, parameters)
