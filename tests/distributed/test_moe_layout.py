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
LENGTH = 3  # tokens of a row, of which some are not real
TOKENS = {  # rows per rank (as many as there are ranks)
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
    "softmax bias": {"bias_update_rate": 0.05},
    "sigmoid bias": {"router": "topk_sigmoid", "bias_update_rate": 0.05},
    "entropies": {"local_entropy_coef": 0.4, "global_entropy_coef": 0.5},
    "jitter": {"router": "jitter_topk", "jitter_eps": 0.3},
    "sample": {"router": "rsample_topk"},
    "expert choice": {"router": "expert_choice", "capacity_factor": 1.5},
    "soft slots": {"router": "soft_slots", "slots_per_expert": 2},
    "by modality": {"router": "by_modality"},
    "by combination": {"router": "by_combination", "num_experts": 12},
    "by interaction": {"router": "by_interaction", "num_experts": 8},
    "by interaction, no gate": {"router": "by_interaction"},
    "noisy": {"router": "noisy_topk", "noise_std": 4.0},
    "residual": {"use_residual": True},
    "shared": {"num_shared_experts": 2},
}
PLAIN = [("plain", 2, tokens) for tokens in TOKENS]
PLAIN += [("plain", top_k, tokens) for top_k in (1, 4) for tokens in ("uneven", "a rank without")]
OTHERS = [(variant, 1, "uneven") for variant in VARIANTS if variant != "plain"]
OTHERS += [
    (variant, 2, "a rank without")
    for variant in VARIANTS
    if variant not in ("plain", "one expert", "residual", "shared", "by interaction, no gate")
]
CASES = [(ep_size, *case) for ep_size in (1, 2, 4) for case in PLAIN + OTHERS]


def build(variant: str, top_k: int) -> nn.Module:
    """Two sparse layers with a linear one between, identical on every rank."""
    from mm_moe.moe.layer import MoELayer
    from mm_moe.moe.settings import MoESettings

    torch.manual_seed(5)
    common = {"num_experts": 4, "top_k": top_k, "num_modalities": 2}
    coefficients = {"load_balance_coef": 0.3, "router_z_coef": 0.2}
    settings = MoESettings(**common | coefficients | VARIANTS[variant])
    first, second = (MoELayer(width=WIDTH, hidden=HIDDEN, settings=settings) for _ in range(2))
    model = nn.ModuleList([first, nn.Linear(WIDTH, WIDTH), second]).double()
    for layer in (first, second):
        for parameter in layer.router.parameters():
            nn.init.normal_(parameter)
            if variant == "one expert":
                parameter.data.zero_()
        for buffer in layer.router.buffers():
            buffer.copy_(torch.randint(-9, 9, buffer.shape))
    return model


def loss_of(model, x_NLD, target_NLD, mask_NL, facts_N2):
    """Loss and routing of a rank's part of the batch; sums, so that parts add up to the whole."""
    from mm_moe.moe.context import TokenContext

    contexts = [TokenContext(modality, *facts_N2.unbind(1)) for modality in (0, 1)]
    hidden, first = model[0](x_NLD, mask_NL, contexts[0])
    hidden, second = model[2](model[1](hidden) + x_NLD, mask_NL, contexts[1])
    routing_loss = sum(sum(record.losses.values()) for record in (first, second))
    return (hidden * target_NLD).sum(), routing_loss, hidden, (first, second)


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
    x, target = torch.randn(2, sum(counts), LENGTH, WIDTH, dtype=torch.float64)
    mask = torch.rand(sum(counts), LENGTH) > 0.25
    # combination 1 to 3 and interaction 0 to 3 of each row
    facts = torch.stack([torch.randint(1, 4, (sum(counts),)), torch.randint(4, (sum(counts),))], 1)

    torch.manual_seed(100)  # a noisy router takes its seed from the first rank
    x_whole = x.clone().requires_grad_()
    task, routing_loss, y_whole, records = loss_of(whole, x_whole, target, mask, facts)
    (task + routing_loss).backward()

    torch.manual_seed(100 + rank)
    x_part = x[part].clone().requires_grad_()
    task_part, routing_part, y_part, parts = loss_of(
        sharded, x_part, target[part], mask[part], facts[part]
    )
    # the engine takes the mean over ranks; times world_size, the parts of the task loss add up
    (task_part * world_size + routing_part).backward()

    found = {
        "output": difference(y_part, y_whole[part]),
        "routing loss": difference(torch.as_tensor(routing_part), torch.as_tensor(routing_loss)),
        "input gradient": difference(x_part.grad / world_size, x_whole.grad[part]),
        "weight gradient": 0.0,
        "rows": 0.0,
    }
    for ours, reference in zip(parts, records, strict=True):
        total_E = ours.tokens_E.clone()
        dist.all_reduce(total_E)
        found["rows"] += float((total_E - reference.tokens_E).abs().sum())
        found["rows"] += float((ours.load_E - reference.load_E).abs().sum())
        choices = float(ours.load_E.sum()) * (1 - float(ours.metrics["dropped"]))
        found["rows"] += abs(float(total_E.sum()) - choices)  # exactly the rows routed
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
