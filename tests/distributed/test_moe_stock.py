"""DeepSpeed's own layer behind our interface: equal to ours, or refused on every rank.

Weights and tokens are in float64; DeepSpeed's gate computes in float32, which sets the bound.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.distributed.harness import run_distributed

pytestmark = pytest.mark.distributed

WIDTH, HIDDEN, BOUND = 6, 10, 2e-6
TOKENS = {  # tokens per rank
    "even": [6, 6],
    "uneven": [9, 2],
    "a rank without": [0, 7],
    "none at all": [0, 0],
}
CASES = [(ep, k, tokens, {}) for ep in (1, 2) for k in (2, 3) for tokens in TOKENS]
CASES += [(ep, 1, "even", {}) for ep in (1, 2)]
CASES += [(1, 1, tokens, {}) for tokens in ("a rank without", "none at all")]
CASES += [(2, 2, "uneven", {"use_residual": True}), (2, 2, "uneven", {"num_shared_experts": 2})]
CASES += [(2, 2, "even", {"drop_tokens": True, "capacity_factor": 4.0})]  # room for all
REFUSED = {  # (ep_size, top_k, tokens, settings): what the message says
    (2, 1, "uneven", ()): "9, 2 tokens",
    (2, 1, "a rank without", ()): "0, 7 tokens",
    (2, 2, "uneven", (("drop_tokens", True), ("min_capacity", 1))): "capacities, 6, 2",
    (1, 1, "uneven", (("drop_tokens", True), ("min_capacity", 4))): "at least min_capacity (4)",
}


def build(top_k: int, options: dict) -> nn.Module:
    """A sparse layer that reads half of its input, and a linear one; identical on every rank."""
    from mm_moe.moe.layer import MoELayer
    from mm_moe.moe.settings import MoESettings

    torch.manual_seed(5)
    values = {"num_experts": 4, "top_k": top_k, "load_balance_coef": 0.0, "router_z_coef": 0.0}
    if top_k == 1:
        values["renormalise"] = False
    settings = MoESettings(**(values | options))
    layer = MoELayer(width=WIDTH, hidden=HIDDEN, settings=settings)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return nn.ModuleList([nn.Linear(WIDTH, WIDTH), layer]).double()


def run(model, x_TD, target_TD, mask_T):
    y_TD, record = model[1](model[0](x_TD), mask_T)
    return (y_TD * target_TD).sum() + sum(record.losses.values()), y_TD, record


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item() if a.numel() else 0.0


def compare(rank, world_size, ep_size, top_k, tokens, options) -> dict[str, float]:
    from mm_moe.moe.parallel import make_expert_parallel
    from mm_moe.moe.parallel_state import logical_tensors

    whole = build(top_k, options)
    stock = make_expert_parallel(copy.deepcopy(whole), ep_size=ep_size, backend="deepspeed")
    counts = TOKENS[tokens]
    part = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    torch.manual_seed(11)
    x_TD, target_TD = torch.randn(2, sum(counts), WIDTH, dtype=torch.float64)
    mask_T = torch.ones(sum(counts), dtype=torch.bool)
    if tokens == "uneven":  # padding makes it more so
        mask_T[::4] = False
    loss, y_whole, reference = run(whole, x_TD, target_TD, mask_T)
    loss.backward()
    loss, y_part, record = run(stock, x_TD[part], target_TD[part], mask_T[part])
    (loss * world_size).backward()  # the engine takes the mean over ranks
    rows_E = record.tokens_E.clone()
    dist.all_reduce(rows_E)
    found = {
        "output": difference(y_part, y_whole[part]),
        "rows": float((rows_E - reference.tokens_E).abs().sum()),
        "metrics": max(difference(record.metrics[n], v) for n, v in reference.metrics.items()),
        "gradient": 0.0,
    }
    held = dict(stock.named_parameters())
    for entry in logical_tensors(stock, held):
        grad = entry.gather([parameter.grad for parameter in entry.parts])
        dist.all_reduce(grad)
        grad = grad / world_size / (1 if entry.owner is None else ep_size)
        gap = difference(grad, whole.get_parameter(entry.name).grad)
        found["gradient"] = max(found["gradient"], gap)
    assert {entry.name for entry in logical_tensors(stock, held)} == set(whole.state_dict())
    return found


def compare_all(rank, world_size):
    return [compare(rank, world_size, *case) for case in CASES]


def test_the_stock_layer_equals_ours():
    ranks = run_distributed(compare_all, 2)
    wrong = {
        (rank, *map(str, case)): found
        for rank, results in enumerate(ranks)
        for case, found in zip(CASES, results, strict=True)
        if not max(found.values()) <= BOUND
    }
    assert not wrong


def refusals(rank, world_size):
    from mm_moe.errors import ParallelismError
    from mm_moe.moe.parallel import make_expert_parallel

    said = []
    for ep_size, top_k, tokens, options in REFUSED:
        model = build(top_k, dict(options))
        with torch.no_grad():
            model[1].router.weight.zero_()  # every token to the first expert
        model = make_expert_parallel(model, ep_size=ep_size, backend="deepspeed")
        try:
            model[1](torch.zeros(TOKENS[tokens][rank], WIDTH, dtype=torch.float64))
            said.append("nothing")
        except ParallelismError as error:
            said.append(str(error))
        dist.barrier()  # the ranks are still in step
    return said


def test_a_batch_that_would_abort_is_refused_on_every_rank():
    ranks = run_distributed(refusals, 2)
    assert ranks[0] == ranks[1]
    for said, part in zip(ranks[0], REFUSED.values(), strict=True):
        assert part in said
        assert "--moe_backend ours" in said


def balances(rank, world_size):
    """The layer's balance loss, and ours of this rank's tokens alone."""
    from mm_moe.moe.parallel import make_expert_parallel

    found = []
    for top_k, tokens in ((1, "even"), (3, "uneven"), (2, "a rank without")):
        whole = build(top_k, {"load_balance_coef": 0.5})[1]
        stock = make_expert_parallel(copy.deepcopy(whole), ep_size=1, backend="deepspeed")
        x_TD = torch.randn(TOKENS[tokens][rank], WIDTH, dtype=torch.float64)
        expected = whole(x_TD)[1].losses["load_balance"]
        found.append((float(stock(x_TD)[1].losses["load_balance"]), float(expected)))
    return found


def test_the_balance_loss_is_that_of_the_rank_and_zero_without_tokens():
    ranks = run_distributed(balances, 2)
    for first, second, _ in ranks:  # at top_k 2 DeepSpeed counts the first choices only
        assert first[0] == pytest.approx(first[1], rel=1e-5)
        assert second[0] == pytest.approx(second[1], rel=1e-5)
    (empty, _), (full, _) = ranks[0][2], ranks[1][2]
    assert empty == 0.0
    assert 0.4 < full < 2.0
