"""The layer on 1, 2 and 4 processes, for every expert-parallel size, equals one process.

Everything is in float64, so that an identity shows as 1e-12 and a wrong scale cannot hide. Each
rank computes the one-process reference itself and reports the largest difference.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.distributed.harness import run_distributed

pytestmark = pytest.mark.distributed

WIDTH, HIDDEN, BOUND = 6, 10, 1e-11
TOKENS = {  # tokens per rank (as many as there are ranks)
    "even": [5, 5, 5, 5],
    "uneven": [9, 2, 1, 4],
    "a rank without": [0, 7, 3, 0],
    "first rank only": [6, 0, 0, 0],
    "none at all": [0, 0, 0, 0],
}
VARIANTS = {
    "plain": {},
    "one expert": {},  # all tokens choose the same expert
    "capacity": {"drop_tokens": True, "capacity_factor": 0.6, "min_capacity": 1},
    "sigmoid": {"router": "topk_sigmoid"},
    "noisy": {"router": "noisy_topk", "noise_std": 4.0},
    "residual": {"use_residual": True},
    "shared": {"num_shared_experts": 2},
}
PLAIN = [("plain", 2, tokens) for tokens in TOKENS]
PLAIN += [("plain", top_k, tokens) for top_k in (1, 4) for tokens in ("uneven", "a rank without")]
OTHERS = [(variant, 1, "uneven") for variant in VARIANTS if variant != "plain"]
OTHERS += [("capacity", 2, "a rank without"), ("noisy", 2, "a rank without")]
CASES = [(ep_size, *case) for ep_size in (1, 2, 4) for case in PLAIN + OTHERS]


def build(variant: str, top_k: int) -> nn.Module:
    """Two sparse layers with a linear one between, identical on every rank."""
    from mm_moe.moe.layer import MoELayer
    from mm_moe.moe.settings import MoESettings

    torch.manual_seed(5)
    settings = MoESettings(
        num_experts=4, top_k=top_k, load_balance_coef=0.3, router_z_coef=0.2, **VARIANTS[variant]
    )
    first, second = (MoELayer(width=WIDTH, hidden=HIDDEN, settings=settings) for _ in range(2))
    model = nn.ModuleList([first, nn.Linear(WIDTH, WIDTH), second]).double()
    for layer in (first, second):
        nn.init.normal_(layer.router.weight)
        if variant == "one expert":
            layer.router.weight.data.zero_()
    return model


def loss_of(model, x_TD, target_TD, mask_T):
    """Loss and routing of a rank's part of the batch; sums, so that parts add up to the whole."""
    hidden, first = model[0](x_TD, mask_T)
    hidden, second = model[2](model[1](hidden) + x_TD, mask_T)
    routing_loss = sum(sum(record.losses.values()) for record in (first, second))
    return (hidden * target_TD).sum(), routing_loss, hidden, (first, second)


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item() if a.numel() else 0.0


def compare(rank, world_size, ep_size, variant, top_k, tokens) -> dict[str, float]:
    from mm_moe.moe.parallel import gather_experts, is_expert_parameter, make_expert_parallel

    whole = build(variant, top_k)
    sharded = make_expert_parallel(copy.deepcopy(whole), ep_size=ep_size)
    counts = TOKENS[tokens][:world_size]
    start = sum(counts[:rank])
    part = slice(start, start + counts[rank])
    torch.manual_seed(11)
    x_TD, target_TD = torch.randn(2, sum(counts), WIDTH, dtype=torch.float64)
    mask_T = torch.rand(sum(counts)) > 0.25

    torch.manual_seed(100)  # a noisy router takes its seed from the first rank
    x_whole = x_TD.clone().requires_grad_()
    task, routing_loss, y_whole, records = loss_of(whole, x_whole, target_TD, mask_T)
    (task + routing_loss).backward()

    torch.manual_seed(100 + rank)
    x_part = x_TD[part].clone().requires_grad_()
    task_part, routing_part, y_part, parts = loss_of(sharded, x_part, target_TD[part], mask_T[part])
    # the engine takes the mean over ranks; times world_size, the parts of the task loss add up
    (task_part * world_size + routing_part).backward()

    found = {
        "output": difference(y_part, y_whole[part]),
        "routing loss": difference(routing_part, routing_loss),
        "input gradient": difference(x_part.grad / world_size, x_whole.grad[part]),
        "weight gradient": 0.0,
        "rows": 0.0,
    }
    for ours, reference in zip(parts, records, strict=True):
        total_E = ours.tokens_E.clone()
        dist.all_reduce(total_E)
        found["rows"] += float((total_E - reference.tokens_E).abs().sum())
        for name, value in ours.metrics.items():
            found["rows"] += difference(value, reference.metrics[name])
    references = dict(whole.named_parameters())
    for name, parameter in sharded.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        grad = parameter.grad.clone()
        if is_expert_parameter(
            parameter
        ):  # whole tensors on every rank: each appears ep_size times in the sum
            grad = gather_experts(grad, sharded[int(name[0])]) / ep_size
        dist.all_reduce(grad)
        gap = difference(grad / world_size, references[name].grad)
        found["weight gradient"] = max(found["weight gradient"], gap)
    return found


def compare_all(rank, world_size):
    return {case: compare(rank, world_size, *case) for case in CASES if world_size % case[0] == 0}


@pytest.fixture(scope="module", params=[1, 2, 4], ids="{} processes".format)
def results(request):
    return request.param, run_distributed(compare_all, request.param)


@pytest.mark.parametrize(
    "quantity", ["output", "routing loss", "input gradient", "weight gradient", "rows"]
)
def test_every_layout_equals_one_process(results, quantity):
    world_size, ranks = results
    wrong = {
        f"rank {rank}, ep_size {case[0]}, {case[1]}, top_k {case[2]}, {case[3]}": found[quantity]
        for rank, cases in enumerate(ranks)
        for case, found in cases.items()
        if not found[quantity] <= BOUND
    }
    assert not wrong
    assert len(ranks[0]) == sum(world_size % case[0] == 0 for case in CASES)
