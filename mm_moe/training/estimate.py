"""What a run needs, before it runs: parameters, bytes per process, the largest micro-batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import nn

from mm_moe.moe.layer import moe_layers
from mm_moe.training.timeline import Timeline
from mm_moe.training.zero_memory import FLOAT32, Overlay

DEVIATIONS = 3  # of the number of missing rows in a batch that the estimate is ready for


@dataclass(frozen=True)
class ParameterCount:
    """Values of one part of a model, experts of all processes.

    Attributes:
        dense: outside the experts.
        expert: of all experts.
        active: dense ones and the experts that one token visits.
        trainable: of dense and expert.
    """

    dense: int
    expert: int
    active: int
    trainable: int

    @property
    def total(self) -> int:
        """Dense and expert."""
        return self.dense + self.expert

    def __add__(self, other: ParameterCount) -> ParameterCount:
        return ParameterCount(
            self.dense + other.dense,
            self.expert + other.expert,
            self.active + other.active,
            self.trainable + other.trainable,
        )


def count_parameters(model: nn.Module) -> dict[str, ParameterCount]:
    """Part of the model ("image", "text", "prompt", "head", ...) -> its parameters.

    Args:
        model: with the experts of all processes.
    """
    share: dict[int, float] = {}
    for layer in moe_layers(model).values():
        visited = layer.settings.top_k / layer.num_experts
        share |= {id(parameter): visited for parameter in layer.experts.parameters()}
    counts: dict[str, ParameterCount] = {}
    for name, parameter in model.named_parameters():
        first, *rest = name.split(".")
        part = rest[1] if first == "backbone" else first
        size, expert = parameter.numel(), id(parameter) in share
        own = ParameterCount(
            dense=0 if expert else size,
            expert=size if expert else 0,
            active=round(size * share.get(id(parameter), 1)),
            trainable=size * parameter.requires_grad,
        )
        counts[part] = counts[part] + own if part in counts else own
    return counts


def rows_of(samples: int, missing: Mapping[str, float], *, ratio: float) -> dict[str, int]:
    """Rows of each modality in a micro-batch, as many as chance gives in hundreds of steps.

    The number of samples that lack something is taken 3 standard deviations below its mean, and
    split between the modalities as on average.

    Args:
        samples: B.
        missing: modality -> share of the samples that lack it.
        ratio: share of the samples that lack something.
    """
    mean, deviation = samples * ratio, math.sqrt(samples * ratio * (1 - ratio))
    lacking = max(0.0, mean - DEVIATIONS * deviation)
    return {
        name: max(1, samples - math.floor(lacking * share / ratio) if ratio else samples)
        for name, share in missing.items()
    }


@dataclass(frozen=True)
class Memory:
    """Bytes of one process at the moment when it needs most.

    Attributes:
        weights: weights and buffers of the model.
        optimizer: float32 weights and moments on the device.
        gradients: gradients that are kept at that moment.
        activations: inputs, activations, and gradients that pass through.
        buffers: buckets and temporary copies.
        host: what offloading keeps on the host.
        when: "forward and backward" or "step".
    """

    weights: int
    optimizer: int
    gradients: int
    activations: int
    buffers: int
    host: int
    when: str

    @property
    def device(self) -> int:
        """Bytes on the device."""
        return self.weights + self.optimizer + self.gradients + self.activations + self.buffers


def peak_memory(
    timeline: Timeline, over: Overlay, *, samples: int, rows: Mapping[str, int], extra: int = 0
) -> Memory:
    """The moment of a step, after the first one, that needs most.

    Args:
        timeline: of the activations.
        over: what the engine holds.
        samples: B of a micro-batch.
        rows: modality -> N.
        extra: bytes that the objective adds beside the pass of one process.
    """
    live_V = timeline.live(samples, dict(rows)) + extra
    total_V = live_V + over.gradients_V + over.buffers_V
    top = int(np.argmax(total_V))
    best = (float(total_V[top]), int(over.gradients_V[top]), int(over.buffers_V[top]))
    activations, when = int(live_V[top]), "forward and backward"
    end = int(timeline.end(samples, dict(rows)))
    for gradients, buffers in over.after:
        if end + gradients + buffers > best[0]:
            best = (end + gradients + buffers, gradients, buffers)
            activations, when = end, "step"
    return Memory(
        weights=over.weights,
        optimizer=over.optimizer,
        gradients=best[1],
        activations=activations,
        buffers=best[2],
        host=over.host,
        when=when,
    )


def build_bytes(counts: Mapping[str, ParameterCount], *, ep_size: int) -> int:
    """Host bytes of a process while it builds the model.

    All experts exist in float32 on every process, and its own ones twice, before the rest is
    dropped. Reading pretrained weights comes on top.
    """
    total = sum(count.total for count in counts.values())
    expert = sum(count.expert for count in counts.values())
    return FLOAT32 * (total + expert // ep_size)


def largest_micro_batch(
    needed: Callable[[int], int], *, available: int, limit: int = 1 << 20
) -> int:
    """The most samples that fit; 0 if not even one does.

    Args:
        needed: bytes by number of samples, never falling.
        available: bytes.
        limit: the answer is at most this.
    """
    low, high = 0, 1
    while high <= limit and needed(high) <= available:
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needed(middle) <= available else (low, middle)
    return low
