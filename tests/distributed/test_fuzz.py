"""Random missingness: the ranks keep step and every number is that of one process.

Each step draws a router (or the whole multimodal model), how many samples each rank has (often
none), which of them lack what, and an expert-parallel size; outputs, losses and all gradients are
compared with one process on the whole batch, in float64.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.distributed import test_moe_layout as layers
from tests.distributed.harness import run_distributed

pytestmark = pytest.mark.distributed

BOUND = 1e-10
MANY_CHOICES = ("plain", "capacity", "sigmoid")  # variants that are also run at top_k 2 and 4
WHOLE_MODEL = "model"
SMALL = {"width": 8, "num_blocks": 2, "num_heads": 2, "hidden": 12, "projection": 8}
SMALL |= {"vocab_size": 50, "patch_size": 32}


def multimodal() -> nn.Module:
    """A whole model with prompts, sparse layers in every block."""
    from mm_moe.models import MultimodalMoEConfig, build_model

    torch.manual_seed(5)
    config = MultimodalMoEConfig(
        backbone_config=dict(SMALL),
        label_names=["x", "y", "z"],
        moe={"num_experts": 4, "load_balance_coef": 0.3, "router_z_coef": 0.2},
        moe_layers=[0, 1],
        prompt="replay",
    )
    model = build_model(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@dataclass(frozen=True)
class Case:
    """What one step draws; the same on every rank."""

    variant: str
    top_k: int
    ep_size: int
    counts: list[int] = field(hash=False)  # samples of each rank
    seed: int = 0


def draw(generator: torch.Generator, world_size: int) -> Case:
    """A random step; a third of the ranks have no sample, whole batches without one occur."""

    def one_of(values):
        return values[int(torch.randint(len(values), (), generator=generator))]

    variant = one_of([*layers.VARIANTS, *[WHOLE_MODEL] * (len(layers.VARIANTS) // 4)])
    counts = torch.randint(-2, 5, (world_size,), generator=generator).clamp(min=0).tolist()
    return Case(
        variant=variant,
        top_k=one_of([1, 2, 4]) if variant in MANY_CHOICES else 1,
        ep_size=one_of([size for size in (1, 2, 4) if world_size % size == 0]),
        counts=counts,
        seed=int(torch.randint(10**6, (), generator=generator)),
    )


def layer_losses(model, case: Case, part: slice):
    """(task loss, router losses, outputs) of two layers on some rows, few or many tokens each."""
    torch.manual_seed(case.seed)
    shape = (sum(case.counts), layers.LENGTH)
    x, target = torch.randn(2, *shape, layers.WIDTH, dtype=torch.float64)
    mask = torch.rand(shape) > torch.rand(shape[0], 1) * 1.4  # whole rows are often empty
    facts = torch.stack([torch.randint(1, 4, shape[:1]), torch.randint(4, shape[:1])], 1)
    torch.manual_seed(case.seed + dist.get_rank() * (part.stop - part.start < shape[0]))
    task, routing, output, _ = layers.loss_of(model, x[part], target[part], mask[part], facts[part])
    return task, routing, output


def model_losses(model, case: Case, part: slice):
    """(task loss, router losses, logits) of the whole model; every sample has something or not."""
    generator = torch.Generator().manual_seed(case.seed)
    count = sum(case.counts)
    pixels = torch.randn(count, 3, 64, 64, generator=generator, dtype=torch.float64)[part]
    ids = torch.randint(3, 50, (count, 6), generator=generator)[part]
    ids[:, 0], ids[:, 5] = 0, 1
    present = (torch.rand(count, 2, generator=generator) > 0.4)[part]
    target = torch.randn(count, 3, generator=generator, dtype=torch.float64)[part]
    inputs = {}
    if present[:, 0].any():
        inputs["image"] = {"pixel_values": pixels[present[:, 0]]}
    if present[:, 1].any():
        text = ids[present[:, 1]]
        inputs["text"] = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    output = model(present=present, inputs=inputs)
    return (output.logits * target).sum(), sum(output.losses.values()), output.logits


def gradients(model: nn.Module, whole: nn.Module) -> torch.Tensor:
    """All gradients of this rank in one row, experts at their global place, the others at 0."""
    from mm_moe.moe.parallel_state import SpreadMoE, is_expert_parameter

    first = {
        f"{prefix}.{name}": layer.first_expert
        for prefix, layer in model.named_modules()
        if isinstance(layer, SpreadMoE)
        for name, _ in layer.named_parameters()
    }
    pieces = []
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        grad = parameter.grad
        if is_expert_parameter(parameter):
            grad = torch.zeros_like(whole.get_parameter(name))
            grad[first[name] : first[name] + len(parameter)] = parameter.grad
        pieces.append(grad.flatten())
    return torch.cat(pieces)


def gap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return (ours - theirs).abs().max().item() if ours.numel() else 0.0


def compare(pair, case: Case, rank: int, world_size: int) -> float:
    """The largest difference of one step from one process."""
    whole, spread = pair
    run = model_losses if case.variant == WHOLE_MODEL else layer_losses
    for model in pair:
        model.zero_grad(set_to_none=True)
    start = sum(case.counts[:rank])
    part = slice(start, start + case.counts[rank])
    task, routing, expected = run(whole, case, slice(0, sum(case.counts)))
    (task + routing).backward()
    our_task, our_routing, ours = run(spread, case, part)
    (our_task * world_size + our_routing).backward()  # the engine takes the mean over ranks
    total = gradients(spread, whole)
    dist.all_reduce(total)
    reference = torch.cat([entry.grad.flatten() for entry in whole.parameters()])
    worst = [gap(ours, expected[part]), gap(total / world_size, reference)]
    return max(*worst, gap(torch.as_tensor(our_routing), torch.as_tensor(routing)))


def fuzz(rank, world_size, steps, seed):
    """(steps by variant, steps in which a rank had no sample, mismatches in words)."""
    from mm_moe.moe.parallel import make_expert_parallel

    generator = torch.Generator().manual_seed(seed)
    pairs: dict[tuple, tuple[nn.Module, nn.Module]] = {}
    seen: dict[str, int] = {}
    idle, wrong = 0, []
    for step in range(steps):
        case = draw(generator, world_size)
        key = case.variant, case.top_k, case.ep_size
        if key not in pairs:
            model_only = case.variant == WHOLE_MODEL
            whole = multimodal() if model_only else layers.build(case.variant, case.top_k)
            spread = make_expert_parallel(copy.deepcopy(whole), ep_size=case.ep_size)
            pairs[key] = whole, spread
        worst = compare(pairs[key], case, rank, world_size)
        seen[case.variant] = seen.get(case.variant, 0) + 1
        idle += 0 in case.counts
        if not worst <= BOUND:
            wrong.append(f"step {step}: {case} differs by {worst:.1e}")
    return seen, idle, wrong


def check(world_size: int, *, steps: int, timeout_s: float) -> None:
    for seen, idle, wrong in run_distributed(fuzz, world_size, steps, 0, timeout_s=timeout_s):
        assert wrong == []
        assert sum(seen.values()) == steps
        assert idle > steps // 4
        if steps >= 500:
            assert seen.keys() == {*layers.VARIANTS, WHOLE_MODEL}


def test_random_missingness_changes_no_number():
    check(2, steps=60, timeout_s=120)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_a_thousand_steps_of_random_missingness(world_size):
    check(world_size, steps=1000, timeout_s=900)
