"""What the parity suite compares: a plain PyTorch loop in one process, and DeepSpeed's engine.

The data holds what breaks expert parallelism: samples of different lengths, quarters and halves of
the batch without a real token (so that ranks, and whole micro-batches, have none), and steps in
which all tokens are nearly the same, so that most experts get nothing.

B samples, L places of a sample, D width, E experts.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_moe.checkpoint.logical import MASTER, optimizer_tensors
from mm_moe.moe.layer import MoELayer
from mm_moe.moe.parallel import make_expert_parallel
from mm_moe.moe.settings import MoESettings
from mm_moe.training import runtime
from mm_moe.training.alone import skip_exchanges
from mm_moe.training.clip import clip_without_zero
from mm_moe.training.gradients import full_gradients
from mm_moe.training.optimizer import parameter_groups

SAMPLES, LENGTH, WIDTH, HIDDEN, CLASSES, EXPERTS = 16, 6, 16, 24, 5, 8  # SAMPLES over all ranks
STEPS, CLIP, LEARNING_RATE, WEIGHT_DECAY = 20, 0.05, 1e-3, 0.05
PATTERNS = 4  # kinds of steps, in turn; gradients are compared over the first of each kind
Batch = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Cell:
    """One combination of the suite."""

    processes: int
    ep_size: int
    stage: int
    accumulation: int
    top_k: int
    precision: str

    def __str__(self) -> str:
        return (
            f"{self.processes} processes, ep_size {self.ep_size}, ZeRO-{self.stage}, "
            f"accumulation {self.accumulation}, top_k {self.top_k}, {self.precision}"
        )


@dataclass
class Trace:
    """What a loop leaves behind; everything is of the whole batch and of all experts.

    Attributes:
        losses: of each step.
        norms: gradient norm before the clip, of each step.
        gradients: by name, of the first `PATTERNS` steps.
        weights: float32, by name, after the last step.
        routed: rows of each expert (layers, E), of each micro-batch.
        tokens: real tokens of each rank, of each micro-batch.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    routed: list[Tensor] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)


class SparseClassifier(nn.Module):
    """Linear, sparse layer, linear, sparse layer, mean over real tokens, classes."""

    def __init__(self, top_k: int) -> None:
        super().__init__()
        settings = MoESettings(num_experts=EXPERTS, top_k=top_k, load_balance_coef=0.1)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.first = MoELayer(width=WIDTH, hidden=HIDDEN, settings=settings)
        self.second = MoELayer(width=WIDTH, hidden=HIDDEN, settings=settings)
        self.head = nn.Linear(WIDTH, CLASSES)
        for layer in (self.first, self.second):
            nn.init.normal_(layer.router.weight, std=0.5)

    def forward(self, x_BLD: Tensor, mask_BL: Tensor, label_B: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and the rows (2, E) that this process sent to each expert."""
        hidden_BLD = self.inner(x_BLD.to(self.inner.weight.dtype))
        y_BLD, first = self.first(hidden_BLD, mask_BL)
        y_BLD, second = self.second(hidden_BLD + y_BLD, mask_BL)
        real_BL1 = mask_BL.unsqueeze(-1)
        mean_BD = (y_BLD * real_BL1).sum(1) / real_BL1.sum(1).clamp(min=1)
        loss = F.cross_entropy(self.head(mean_BD).float(), label_B)
        for record in (first, second):
            loss = loss + sum(record.losses.values())
        return loss, torch.stack([first.tokens_E, second.tokens_E])


def build(top_k: int) -> SparseClassifier:
    """The same model for everyone."""
    torch.manual_seed(3)
    return SparseClassifier(top_k)


def batches() -> Iterator[Batch]:
    """The same global batches for everyone: (x (B, L, D), mask (B, L), label (B))."""
    generator = torch.Generator().manual_seed(7)
    quarter = SAMPLES // 4
    for step in range(STEPS):
        x_BLD = torch.randn(SAMPLES, LENGTH, WIDTH, generator=generator)
        length_B = torch.randint(1, LENGTH + 1, (SAMPLES,), generator=generator)
        kind = step % PATTERNS
        if kind == 1:  # second half: one of two ranks, or a whole micro-batch of two
            length_B[2 * quarter :] = 0
        if kind == 2:  # one direction: as many experts as choices
            x_BLD = 2 * x_BLD[:1, :1] + 0.3 * x_BLD
        if kind == 3:  # second and last quarter: half the ranks of every micro-batch
            length_B[quarter : 2 * quarter] = 0
            length_B[3 * quarter :] = 0
        mask_BL = torch.arange(LENGTH) < length_B.unsqueeze(1)
        yield x_BLD, mask_BL, torch.randint(0, CLASSES, (SAMPLES,), generator=generator)


def parts(batch: Batch, count: int) -> Iterable[Batch]:
    """A batch in equal parts."""
    return zip(*(tensor.chunk(count) for tensor in batch), strict=True)


def _adamw(groups: list[dict]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=LEARNING_RATE)


def plain_loop(*, accumulation: int, top_k: int) -> Trace:
    """The reference: one process, no DeepSpeed, all experts, every micro-batch whole.

    The balance loss is no mean over samples, so micro-batches are those of the engine.
    """
    model, trace = build(top_k), Trace()
    decays: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        vector = parameter.ndim - (".experts." in name) == 1
        (plain if vector else decays).append(parameter)
    optimizer = _adamw(
        [{"params": decays, "weight_decay": WEIGHT_DECAY}, {"params": plain, "weight_decay": 0.0}]
    )
    for batch in batches():
        loss = 0.0
        for part in parts(batch, accumulation):
            part_loss, routed = model(*part)
            (part_loss / accumulation).backward()
            loss += part_loss.item() / accumulation
            trace.routed.append(routed)
        trace.losses.append(loss)
        if len(trace.gradients) < PATTERNS:
            trace.gradients.append(
                {name: entry.grad.clone() for name, entry in model.named_parameters()}  # type: ignore[union-attr]
            )
        trace.norms.append(nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        optimizer.zero_grad()
    trace.weights = {name: entry.detach() for name, entry in model.named_parameters()}
    return trace


def make_engine(cell: Cell) -> Any:
    """A DeepSpeed engine of one cell, made as the trainer makes its own."""
    model = make_expert_parallel(build(cell.top_k), ep_size=cell.ep_size)
    groups = parameter_groups(model, weight_decay=WEIGHT_DECAY, learning_rate=LEARNING_RATE)
    config = {
        "train_micro_batch_size_per_gpu": SAMPLES // cell.processes // cell.accumulation,
        "gradient_accumulation_steps": cell.accumulation,
        "zero_optimization": {"stage": cell.stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": CLIP,
        "bf16": {"enabled": cell.precision == "bf16"},
    }
    deepspeed = importlib.import_module("deepspeed")
    engine, *_ = deepspeed.initialize(model=model, optimizer=_adamw(groups), config=config)
    clip_without_zero(engine)
    skip_exchanges(engine)
    return engine


def engine_loop(cell: Cell) -> Trace:
    """The same through DeepSpeed; each rank takes its part of every micro-batch. A collective."""
    engine, trace, local = make_engine(cell), Trace(), []
    for batch in batches():
        for part in parts(batch, cell.accumulation):
            mine = list(parts(part, cell.processes))[runtime.rank()]
            loss, routed = engine(*mine)
            engine.backward(loss)
            local.append((loss.item(), routed, int(mine[1].sum())))
            if engine.is_gradient_accumulation_boundary() and len(trace.gradients) < PATTERNS:
                trace.gradients.append(full_gradients(engine))
            engine.step()
        trace.norms.append(float(engine.get_global_grad_norm()))
    tensors, _ = optimizer_tensors(engine)
    trace.weights = {
        name.removeprefix(f"{MASTER}/"): value
        for name, value in tensors.items()
        if name.startswith(f"{MASTER}/")
    }
    every = runtime.gather_objects(local)
    losses = [sum(rank[i][0] for rank in every) / len(every) for i in range(len(local))]
    for start in range(0, len(losses), cell.accumulation):
        trace.losses.append(sum(losses[start : start + cell.accumulation]) / cell.accumulation)
    trace.routed = [sum(rank[i][1] for rank in every) for i in range(len(local))]
    trace.tokens = [[rank[i][2] for rank in every] for i in range(len(local))]
    return trace
