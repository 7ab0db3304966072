"""How fast a run trains: samples, tokens, operations and waiting, without what is no training.

A step lasts from the first batch that it asks for to the end of the optimizer's step. Evaluations
and checkpoints lie between steps and do not count, nor does the first step after a start or resume,
which opens streams, starts workers and allocates. Nothing is sent between processes here: `take`
gives one process' sums, and `rates` combines those of all, gathered when a line is logged.

Operations are those of the passes that the model asks for: 2 per multiplied weight and position
forward, and again for each gradient that is needed (of the weight, of the input), which makes the
6 per weight and token of a model that trains whole; experts count the rows that reach them. Scores
and mixing of attention add 4 N L L D forward and twice that backward. Padding that is computed is
counted, blocks that are computed a second time in the backward pass are not (PaLM, appendix B).

N rows, L positions, D width.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from mm_moe.backbones.base import Tower
from mm_moe.batch import Batch
from mm_moe.moe.experts import Experts
from mm_moe.training.exchange import GPUS

GB = 1e9
PROBE = 768  # side of the matrices by which a rate is measured
PROBE_S = 0.15
NAMED_GPUS = {"H100 PCIe": "H100-PCIE"} | {name: name for name in GPUS}  # the longer names first


@dataclass(frozen=True)
class Peak:
    """What one process' device can do at most.

    Attributes:
        flops_per_s: floating-point operations per second.
        known: from the maker's table; else measured here.
    """

    flops_per_s: float
    known: bool


@dataclass(frozen=True)
class Sums:
    """What one process did in the counted steps since the last line.

    Attributes:
        steps: how many.
        busy_s: their duration.
        waited_s: of it, waiting for data.
        rows: samples.
        tokens: real ones that entered the first block of a tower.
        flops: see above.
        memory: bytes; the peak of the GPU, or what the process holds now.
        peak: of the device.
    """

    steps: int
    busy_s: float
    waited_s: float
    rows: int
    tokens: float
    flops: float
    memory: int
    peak: Peak


def rates(everyone: Sequence[Sums]) -> dict[str, float]:
    """The figures of a log line, over all processes.

    The slowest process says how long a step takes, and the one that waits most for its data holds
    all others up: times and shares are the largest, not means. Without a counted step there is only
    the memory.
    """
    found = {"perf/memory_gb": max(one.memory for one in everyone) / GB}
    steps, busy_s = max(one.steps for one in everyone), max(one.busy_s for one in everyone)
    if not steps or busy_s <= 0:
        return found
    rows = sum(one.rows for one in everyone) / busy_s
    peak = sum(one.peak.flops_per_s for one in everyone)
    share = "perf/mfu" if all(one.peak.known for one in everyone) else "perf/matmul_share"
    return found | {
        "perf/samples_per_second": rows,
        "perf/samples_per_second_per_gpu": rows / len(everyone),
        "perf/tokens_per_second": sum(one.tokens for one in everyone) / busy_s,
        share: sum(one.flops for one in everyone) / busy_s / peak,
        "perf/data_wait_share": max(one.waited_s / max(one.busy_s, 1e-9) for one in everyone),
        "perf/step_time_s": busy_s / steps,
    }


def device_peak(device: torch.device, *, half: bool) -> Peak:
    """The table's rate of a known GPU; elsewhere the rate of a square matrix product, measured.

    Half of the table's bfloat16 rate stands for float32, as in the planner. Uses no random number.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, entry in NAMED_GPUS.items():
            if part in name:
                return Peak(GPUS[entry][0] * (1 if half else 0.5), known=True)
    return Peak(matmul_rate(device, half=half), known=False)


def matmul_rate(device: torch.device, *, half: bool) -> float:
    """Operations per second of the fastest of the products that fit into a moment."""
    dtype = torch.bfloat16 if half else torch.float32
    left = torch.full((PROBE, PROBE), 0.5, dtype=dtype, device=device)
    out = torch.empty_like(left)
    best, since = float("inf"), time.perf_counter()
    while time.perf_counter() - since < PROBE_S or best == float("inf"):
        began = time.perf_counter()
        torch.mm(left, left, out=out)
        _finish(device)
        best = min(best, time.perf_counter() - began)
    return 2 * PROBE**3 / best


def _finish(device: torch.device) -> None:
    """Wait for what the device still has to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Throughput(TrainerCallback):
    """Clock and counter of one process' training steps.

    Args:
        model: whose modules are counted while it trains.
        half: whether it computes in bfloat16.
    """

    def __init__(self, model: nn.Module, *, half: bool) -> None:
        self.model, self.half = model, half
        self.device = torch.device("cpu")
        self.peak = Peak(1.0, known=False)  # measured when training begins
        self._hooks: list[Any] = []
        self._in_pass = False
        self._warm = False  # whether the first step is over
        self._reset()

    def _reset(self) -> None:
        self._steps = self._rows = 0
        self._busy_s = self._waited_s = 0.0
        self._flops = 0.0
        self._positions: float = 0
        self._padding: Tensor | float = 0.0
        self._since: float | None = None  # of the step that runs
        self._ended: float | None = None  # of the newest step

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start anew: measure the device, watch the modules."""
        self.device = next(self.model.parameters()).device
        self.peak = device_peak(self.device, half=self.half)
        self._watch()
        self._warm = False
        self._reset()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the modules alone again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the wait for the batches of a step, with which the step begins."""
        began = time.perf_counter()
        if self._since is None:
            self._since = began
        yield
        self._waited_s += time.perf_counter() - began

    @contextlib.contextmanager
    def training_pass(self, batch: Batch) -> Iterator[None]:
        """Around the forward pass of a micro-batch: what it computes is counted."""
        self._rows += len(batch.ids)
        for payload in batch.inputs.values():
            mask = payload.get("attention_mask")
            if mask is not None:  # summed on the device, read with the log line
                self._padding = self._padding + (mask.numel() - mask.sum())
        self._in_pass = True
        try:
            yield
        finally:
            self._in_pass = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock; forget the first step."""
        if not self._warm:
            _finish(self.device)
            self._reset()
            self._warm = True
            return
        self._ended = time.perf_counter()
        if self._since is not None:
            self._busy_s += self._ended - self._since
            self._steps += 1
        self._since = None

    def take(self) -> Sums:
        """The sums since the last call, which begin anew.

        Called right after a step: what the device had still to do belongs to it.
        """
        if self._ended is not None and self.device.type == "cuda":
            _finish(self.device)
            self._busy_s += time.perf_counter() - self._ended
        sums = Sums(
            steps=self._steps,
            busy_s=self._busy_s,
            waited_s=self._waited_s,
            rows=self._rows if self._steps else 0,
            tokens=max(0.0, self._positions - float(self._padding)),
            flops=self._flops,
            memory=self._memory(),
            peak=self.peak,
        )
        self._reset()
        return sums

    def _memory(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return int(psutil.Process().memory_info().rss)

    def _watch(self) -> None:
        """Hook every module that multiplies, and the feed-forwards, which see all tokens."""
        self.on_train_end(None, None, None)
        for module in self.model.modules():
            if isinstance(module, MULTIPLIES):
                self._hooks.append(module.register_forward_hook(self._count_weights))
            if isinstance(module, Tower):
                places = module.feed_forwards()
                for block, (parent, attribute) in enumerate(places):
                    hook = self._attention_counter(first=block == 0, attends=module.attends)
                    self._hooks.append(getattr(parent, attribute).register_forward_hook(hook))

    def _count_weights(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._in_pass:
            return  # an evaluation, or the second pass of activation checkpointing
        x: Tensor = args[0]
        learns = any(p.requires_grad for p in module.parameters(recurse=False))
        gradients = learns + x.requires_grad if torch.is_grad_enabled() else 0
        self._flops += multiplied(module, x, output) * (1 + gradients)

    def _attention_counter(self, *, first: bool, attends: bool) -> Any:
        def count(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            x: Tensor = args[0]
            if not self._in_pass:
                return
            if first:
                self._positions += x.numel() // x.shape[-1]
            if attends and x.ndim == 3:
                forward = 4.0 * x.numel() * x.shape[1]
                self._flops += forward * (3 if x.requires_grad else 1)

        return count


MULTIPLIES = (nn.Linear, nn.modules.conv._ConvNd, nn.MultiheadAttention, nn.RNNBase, Experts)


def multiplied(module: nn.Module, x: Tensor, output: Any) -> float:
    """Operations of one module's weights in one forward pass.

    Args:
        module: of a type in `MULTIPLIES`.
        x: its first input.
        output: what it returned.
    """
    if isinstance(module, Experts):
        per_row = module.w_in[0].numel() + module.w_out[0].numel()
        return 2.0 * x.shape[0] * per_row
    if isinstance(module, nn.Linear):
        return 2.0 * output.numel() * module.in_features
    if isinstance(module, nn.modules.conv._ConvNd):
        return 2.0 * output.numel() * module.weight[0].numel()
    positions = x.numel() // x.shape[-1]
    if isinstance(module, nn.MultiheadAttention):  # its own output layer is never called
        return 2.0 * positions * 4 * module.embed_dim**2
    return 2.0 * positions * sum(p.numel() for p in module.parameters() if p.ndim == 2)
