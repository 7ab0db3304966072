"""What one process leaves out of DeepSpeed's exchanges changes no bit, and is left out."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.distributed.harness import run_distributed

pytestmark = pytest.mark.distributed

CASES = [  # (ZeRO stage, accumulation, precision)
    (0, 1, "fp32"),
    (0, 2, "fp32"),
    (1, 2, "fp32"),
    (2, 1, "fp32"),
    (2, 2, "fp32"),
    (1, 2, "bf16"),
    (2, 2, "bf16"),
]


def both_loops(rank, world_size):
    """For each case, a loop with the exchanges left out, and one with all of them."""
    from eval.benchmarks import parity_loops

    skip, found = parity_loops.skip_exchanges, []
    parity_loops.STEPS = parity_loops.PATTERNS
    for stage, accumulation, precision in CASES:
        cell = parity_loops.Cell(1, 1, stage, accumulation, 2, precision)
        pair = []
        for change in (skip, lambda engine: None):
            parity_loops.skip_exchanges = change
            pair.append(dataclasses.asdict(parity_loops.engine_loop(cell)))
        found.append(pair)
    return found


def test_one_process_trains_to_the_same_bits_without_the_exchanges():
    (found,) = run_distributed(both_loops, 1)
    for case, (short, whole) in zip(CASES, found, strict=True):
        assert short["losses"] == whole["losses"], case
        assert short["norms"] == whole["norms"], case
        for name, weight in whole["weights"].items():
            assert torch.equal(short["weights"][name], weight), (case, name)
        for step, gradients in enumerate(whole["gradients"]):
            for name, gradient in gradients.items():
                assert torch.equal(short["gradients"][step][name], gradient), (case, step, name)


def calls(rank, world_size, stage):
    """How often a step of an engine goes to DeepSpeed's reduction."""
    from eval.benchmarks import parity_loops

    cell = parity_loops.Cell(world_size, 1, stage, 1, 1, "fp32")
    engine, count = parity_loops.make_engine(cell), 0
    name = "allreduce_bucket"
    owner = engine.optimizer if stage else engine
    reduce = getattr(owner, name)

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        return reduce(*args, **kwargs)

    setattr(owner, name, counted)
    batch = next(parity_loops.batches())
    mine = list(parity_loops.parts(batch, world_size))[rank]
    engine.backward(engine(*mine)[0])
    engine.step()
    return count


@pytest.mark.parametrize("stage", [0, 2])
def test_only_one_process_leaves_them_out(stage):
    assert run_distributed(calls, 1, stage) == [0]
    assert all(count > 0 for count in run_distributed(calls, 2, stage))


def test_a_norm_that_is_not_finite_is_minus_1_as_deepspeed_has_it():
    from mm_moe.training.alone import _norm

    padding = torch.full((2,), 9.0)
    padding._zero_padding = True
    assert float(_norm([torch.tensor([3.0]), torch.tensor([4.0]), padding], None)) == 5.0
    assert float(_norm([torch.tensor([3.0, torch.nan])], None)) == -1.0
    assert float(_norm([torch.tensor([torch.inf])], None)) == -1.0
