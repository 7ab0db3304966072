"""A model with a fill over two processes equals one process, forward and backward."""

import copy

import torch
import torch.distributed as dist

from tests.distributed.harness import run_distributed
from tests.fill_model import PRESENT, batch_of, model_of

BOUND = 1e-9
COUNTS = {"even": (4, 3), "nothing missing on the first": (2, 5), "no sample on the second": (7, 0)}
FILLS = {
    "retriever": {"dropout": 0.0, "segments": True, "around_default": True},
    "mean": {},
    "neighbour": {},
}


def gap(a, b):
    return (a - b).abs().max().item() if a.numel() else 0.0


def outcome(model, batch, *, scale):
    """Sums over samples, so that parts add up; routers' losses are those of the whole batch."""
    torch.manual_seed(7)  # the noise is the first rank's
    output = model(**batch)
    losses = sum(output.losses.values(), torch.zeros((), dtype=torch.float64))
    (scale * output.logits[:, 0].square().sum() + losses).backward()
    return output


def compare(rank, world_size, ep_size, fill, counts):
    from mm_moe.moe.parallel import gather_experts, is_expert_parameter, make_expert_parallel

    whole = model_of(fill, FILLS[fill]).double()
    sharded = make_expert_parallel(copy.deepcopy(whole), ep_size=ep_size)
    options = {"dtype": torch.float64, "whole": fill == "neighbour"}
    wanted = outcome(whole, batch_of(PRESENT, **options), scale=1)
    start = sum(counts[:rank])
    own = slice(start, start + counts[rank])
    found = outcome(sharded, batch_of(PRESENT, part=own, **options), scale=world_size)
    gaps = {"logits": gap(found.logits, wanted.logits[own]), "gradient": 0.0}
    gaps |= {name: gap(loss, wanted.losses[name]) for name, loss in found.losses.items()}
    references = dict(whole.named_parameters())
    for name, parameter in sharded.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        if is_expert_parameter(parameter):
            grad = gather_experts(grad, sharded.fill.layer) / ep_size
        dist.all_reduce(grad)
        gaps["gradient"] = max(gaps["gradient"], gap(grad / world_size, references[name].grad))
    buffers = dict(whole.named_buffers())
    gaps["buffers"] = max(
        [0.0, *(gap(b.double(), buffers[n].double()) for n, b in sharded.named_buffers())]
    )
    if fill == "retriever":
        assert set(found.losses) == {"fill_importance", "fill_load", "fill_router_z"}
    return gaps


def compare_all(rank, world_size):
    return {
        (ep_size, fill, samples): compare(rank, world_size, ep_size, fill, counts)
        for ep_size in (1, 2)
        for fill in FILLS
        for samples, counts in COUNTS.items()
    }


def test_two_processes_equal_one_forward_and_backward():
    for cases in run_distributed(compare_all, 2):
        assert len(cases) == 2 * 3 * 3
        wrong = {case: found for case, found in cases.items() if not max(found.values()) <= BOUND}
        assert wrong == {}
