"""The sparse fusion of clinical data on 2 processes equals one process, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import run_distributed

pytestmark = pytest.mark.distributed

BOUND = 1e-11
SEQUENCES = {"labs": {"width": 5, "length": 1}, "vitals": {"width": 2, "length": 4}}
SAMPLES = {"uneven": [5, 2], "a rank without": [0, 4], "none at all": [0, 0]}
ROUTERS = {"noisy_topk": 6, "by_modality": 4}


def model_of(router):
    from mm_moe.models import MultimodalMoEConfig, build_model

    torch.manual_seed(3)
    shape = {"num_tokens": 2, "token_width": 8, "num_heads": 2}
    options = {"depth": 2, "num_heads": 2, "dropout": 0.0, "sparse": "all", "top_k": 2}
    config = MultimodalMoEConfig(
        backbone="clinical",
        backbone_config={**shape, "sequences": SEQUENCES},
        modalities=[*SEQUENCES],
        label_names=["alive", "dead"],
        fusion="transformer",
        fusion_options={**options, "router": router, "num_experts": ROUTERS[router]},
    )
    return build_model(config).double()


def batch_of(count, part):
    """Rows `part` of a batch; every third sample lacks the first modality, others the second."""
    generator = torch.Generator().manual_seed(7)
    present = torch.ones(count, 2, dtype=torch.bool)
    present[::3, 0] = False
    present[1::3, 1] = False
    inputs = {}
    for m, (name, about) in enumerate(SEQUENCES.items()):
        shape = (count, about["length"], about["width"])
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        rows = values[part][present[part, m]]
        if len(rows):
            inputs[name] = {"values": rows, "mask": torch.ones(rows.shape[:2], dtype=torch.bool)}
    return {"present": present[part], "inputs": inputs}


def loss_of(model, batch):
    """A sum over samples, so that parts add up; the routers' losses are those of all ranks."""
    output = model(**batch)
    routing = sum(output.losses.values(), torch.zeros((), dtype=torch.float64))
    return output.logits.square().sum(), routing, output


def gap(a, b):
    return (a - b).abs().max().item() if a.numel() else 0.0


def compare(rank, world_size, ep_size, router, samples):
    from mm_moe.moe.layer import moe_layers
    from mm_moe.moe.parallel import gather_experts, is_expert_parameter, make_expert_parallel

    whole = model_of(router)
    sharded = make_expert_parallel(copy.deepcopy(whole), ep_size=ep_size)
    (
        whole.eval(),
        sharded.eval(),
    )  # noise is drawn by the place of a token, which the ranks share out
    counts = SAMPLES[samples]
    start = sum(counts[:rank])
    own = slice(start, start + counts[rank])
    total, routing, output = loss_of(whole, batch_of(sum(counts), slice(None)))
    (total + routing).backward()
    part, part_routing, said = loss_of(sharded, batch_of(sum(counts), own))
    (part * world_size + part_routing).backward()
    found = {
        "logits": gap(said.logits, output.logits[own]),
        "routing": gap(part_routing, routing),
        "gradient": 0.0,
    }
    layers = moe_layers(sharded)
    references = dict(whole.named_parameters())
    for name, parameter in sharded.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        if is_expert_parameter(parameter):
            layer = layers[name.rsplit(".experts.", 1)[0]]
            grad = gather_experts(grad, layer) / ep_size
        dist.all_reduce(grad)
        other = references[name].grad
        other = torch.zeros_like(references[name]) if other is None else other
        found["gradient"] = max(found["gradient"], gap(grad / world_size, other))
    return found


def compare_all(rank, world_size):
    return {
        (ep_size, router, samples): compare(rank, world_size, ep_size, router, samples)
        for ep_size in (1, 2)
        for router in ROUTERS
        for samples in SAMPLES
    }


def test_two_processes_equal_one_forward_and_backward():
    for cases in run_distributed(compare_all, 2):
        assert len(cases) == 2 * 2 * 3
        wrong = {case: found for case, found in cases.items() if not max(found.values()) <= BOUND}
        assert wrong == {}
