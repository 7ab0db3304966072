"""Training through DeepSpeed's engine on 1, 2 and 4 processes equals a plain one-process loop.

ZeRO 1 and 2, every expert-parallel size, AdamW, clipping that bites, twenty steps, batches in which
ranks have different numbers of real tokens and one rank has none.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from tests.distributed.harness import run_distributed

pytestmark = pytest.mark.distributed

SAMPLES, LENGTH, WIDTH, HIDDEN, CLASSES = 8, 6, 16, 24, 5  # SAMPLES over all ranks
STEPS, CLIP, LEARNING_RATE = 20, 0.3, 3e-3
LAYOUTS = [(stage, ep_size, top_k) for stage, top_k in ((1, 2), (2, 1)) for ep_size in (1, 2, 4)]


class Model(nn.Module):
    """Linear, sparse layer, linear, sparse layer, mean over real tokens, classes."""

    def __init__(self, top_k: int) -> None:
        from mm_moe.moe.layer import MoELayer
        from mm_moe.moe.settings import MoESettings

        super().__init__()
        settings = MoESettings(num_experts=4, top_k=top_k, load_balance_coef=0.1)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.first = MoELayer(width=WIDTH, hidden=HIDDEN, settings=settings)
        self.second = MoELayer(width=WIDTH, hidden=HIDDEN, settings=settings)
        self.head = nn.Linear(WIDTH, CLASSES)
        for layer in (self.first, self.second):
            nn.init.normal_(layer.router.weight, std=0.3)

    def forward(self, x, mask, label):
        hidden = self.inner(x)
        y, first = self.first(hidden, mask)
        y, second = self.second(hidden + y, mask)
        pooled = (y * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        loss = F.cross_entropy(self.head(pooled), label)
        return loss + sum(sum(record.losses.values()) for record in (first, second))


def batches():
    """The same twenty global batches for everyone; in some, the last quarter has no real token."""
    generator = torch.Generator().manual_seed(7)
    for step in range(STEPS):
        x = torch.randn(SAMPLES, LENGTH, WIDTH, generator=generator)
        length = torch.randint(1, LENGTH + 1, (SAMPLES,), generator=generator)
        if step % 3 == 1:
            length[-SAMPLES // 4 :] = 0
        mask = torch.arange(LENGTH) < length.unsqueeze(1)
        yield x, mask, torch.randint(0, CLASSES, (SAMPLES,), generator=generator)


def build(top_k: int) -> nn.Module:
    torch.manual_seed(3)
    return Model(top_k)


def adamw(groups):
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, weight_decay=0.01)


def plain_loop(top_k: int):
    """Losses, gradient norms and final weights of the one-process reference."""
    model, losses, norms = build(top_k), [], []
    optimizer = adamw(model.parameters())
    for x, mask, label in batches():
        loss = model(x, mask, label)
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms, model


def engine_loop(rank, world_size, stage, ep_size, top_k):
    """The same through a DeepSpeed engine; each rank takes its part of every batch."""
    import deepspeed
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    from mm_moe.moe.parallel import make_expert_parallel

    model = make_expert_parallel(build(top_k), ep_size=ep_size)
    groups = split_params_into_different_moe_groups_for_optimizer(
        {"params": list(model.parameters()), "name": "all"}
    )
    config = {
        "train_micro_batch_size_per_gpu": SAMPLES // world_size,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": CLIP,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw(groups), config=config)
    assert engine.has_moe_layers
    assert engine.num_experts == [4, 4]
    losses, norms = [], []
    part = slice(rank * SAMPLES // world_size, (rank + 1) * SAMPLES // world_size)
    for batch in batches():
        loss = engine(*(tensor[part] for tensor in batch))
        engine.backward(loss)
        engine.step()
        losses.append(mean_over_ranks(loss))
        norms.append(float(engine.get_global_grad_norm()))
    return losses, norms, model


def mean_over_ranks(value: torch.Tensor) -> float:
    total = value.detach().clone()
    dist.all_reduce(total)
    return total.item() / dist.get_world_size()


def compare(reference, ours) -> dict[str, float]:
    """Largest loss difference, largest relative norm difference, largest weight difference."""
    from mm_moe.moe.parallel import slice_experts

    (losses, norms, whole), (our_losses, our_norms, model) = reference, ours
    weights = 0.0
    for name, parameter in model.named_parameters():
        expected = whole.get_parameter(name)
        if ".experts." in name:
            expected = slice_experts(expected, model.get_submodule(name.split(".")[0]))
        weights = max(weights, (parameter - expected).abs().max().item())
    return {
        "loss": max(abs(a - b) for a, b in zip(losses, our_losses, strict=True)),
        "norm": max(abs(a - b) / a for a, b in zip(norms, our_norms, strict=True)),
        "weights": weights,
        "clipped": sum(norm > CLIP for norm in norms) / len(norms),
    }


def train_all(rank, world_size):
    references = {top_k: plain_loop(top_k) for top_k in {layout[2] for layout in LAYOUTS}}
    return {
        layout: compare(copy.copy(references[layout[2]]), engine_loop(rank, world_size, *layout))
        for layout in LAYOUTS
        if world_size % layout[1] == 0
    }


@pytest.fixture(scope="module", params=[1, 2, 4], ids="{} processes".format)
def results(request):
    return request.param, run_distributed(train_all, request.param)


@pytest.mark.parametrize(("quantity", "bound"), [("loss", 1e-5), ("norm", 1e-5), ("weights", 1e-4)])
def test_twenty_steps_equal_the_plain_loop(results, quantity, bound):
    world_size, ranks = results
    wrong = {
        f"rank {rank}, ZeRO-{layout[0]}, ep_size {layout[1]}, top_k {layout[2]}": found[quantity]
        for rank, layouts in enumerate(ranks)
        for layout, found in layouts.items()
        if not found[quantity] <= bound
    }
    assert not wrong
    assert len(ranks[0]) == sum(world_size % layout[1] == 0 for layout in LAYOUTS)


def test_clipping_was_at_work(results):
    _, ranks = results
    assert all(found["clipped"] == 1 for layouts in ranks for found in layouts.values())
