"""What DeepSpeed 0.19.8 holds beside the activations, moment by moment, at ZeRO stage 0, 1 and 2.

Read from `deepspeed/runtime/zero/stage_1_and_2.py` and `engine.py`, and checked against measured
peaks by `python -m eval.benchmarks.memory_estimate`. Bytes are those of one process; of processes
that differ by their place in a partition, the one that needs most.

V moments of a timeline.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
from torch import nn

from mm_moe.moe.parallel import is_expert_parameter
from mm_moe.training.optimizer import parameter_groups

FLOAT32, NORM_BYTES = 4, 8  # DeepSpeed takes norms in float64
ALIGNMENT = 2  # elements per process to which a flat group is padded
FALLBACK_BUCKET = 500_000_000  # elements that stage 0 reduces at once


@dataclass(frozen=True)
class ZeroSettings:
    """How a run is sharded.

    Attributes:
        stage: 0, 1 or 2.
        world_size: processes.
        ep_size: processes that share one set of experts.
        half: bf16 weights and gradients; optimizer state is float32 in any case.
        offload: optimizer state and its step on the host.
        reduce_bucket_size: elements of a gradient bucket.
        overlap_comm: two such buckets.
        accumulation: micro-batches of a step.
        clips: whether gradients are clipped.
    """

    stage: int
    world_size: int = 1
    ep_size: int = 1
    half: bool = False
    offload: bool = False
    reduce_bucket_size: int = 500_000_000
    overlap_comm: bool = False
    accumulation: int = 1
    clips: bool = True

    @property
    def element(self) -> int:
        """Bytes of a weight or gradient."""
        return 2 if self.half else FLOAT32


@dataclass(frozen=True)
class Slot:
    """A trainable parameter in its group: name, elements, place in the flat group."""

    name: str
    size: int
    start: int


@dataclass(frozen=True)
class Group:
    """One parameter group of the optimizer, as ZeRO flattens and splits it.

    Attributes:
        slots: its parameters in order.
        expert: whether they are experts.
        ranks: processes over which it is split.
    """

    slots: tuple[Slot, ...]
    expert: bool
    ranks: int

    @property
    def size(self) -> int:
        """Elements without padding."""
        return sum(slot.size for slot in self.slots)

    @property
    def padded(self) -> int:
        """Elements of the flat tensor."""
        unit = ALIGNMENT * self.ranks
        return math.ceil(self.size / unit) * unit

    @property
    def partition(self) -> int:
        """Elements of one process' part."""
        return self.padded // self.ranks

    def parts(self, slot: Slot) -> list[tuple[int, int]]:
        """(partition, elements) of a parameter, in order."""
        first = slot.start // self.partition
        last = (slot.start + slot.size - 1) // self.partition
        edges = [slot.start, *((p + 1) * self.partition for p in range(first, last))]
        edges.append(slot.start + slot.size)
        sizes = [b - a for a, b in itertools.pairwise(edges)]
        return list(zip(range(first, last + 1), sizes, strict=True))

    def worst_part(self) -> int:
        """The partition whose parameters, taken whole, have most elements."""
        whole: dict[int, int] = {}
        for slot in self.slots:
            for part, _ in self.parts(slot):
                whole[part] = whole.get(part, 0) + slot.size
        return max(whole, key=lambda part: whole[part])


def optimizer_groups(
    model: nn.Module, *, zero: ZeroSettings, scale: Callable[[str], float]
) -> list[Group]:
    """The groups that the trainer makes of a model which holds the experts of one process.

    Args:
        model: tensors may be on the meta device; experts carry DeepSpeed's tags.
        zero: the layout.
        scale: learning-rate factor by name, as the trainer's.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = parameter_groups(model, weight_decay=1.0, learning_rate=1.0, scale=scale)
    groups = []
    for group in found:
        slots, start = [], 0
        for parameter in group["params"]:
            slots.append(Slot(names[id(parameter)], parameter.numel(), start))
            start += parameter.numel()
        expert = is_expert_parameter(group["params"][0])
        ranks = zero.world_size // zero.ep_size if expert else zero.world_size
        groups.append(Group(tuple(slots), expert, ranks))
    return groups


@dataclass
class Overlay:
    """Bytes that the engine adds to the activations.

    Attributes:
        weights: trainable and frozen weights and the model's buffers.
        optimizer: float32 weights and both moments, on the device.
        host: what offloading keeps on the host.
        gradients_V: gradients, at each moment of a timeline.
        buffers_V: buckets and temporary copies, likewise.
        after: (gradients, buffers) at moments behind the backward pass.
        start: weights and copies while the engine is made.
    """

    weights: int
    optimizer: int
    host: int
    start: int
    gradients_V: np.ndarray
    buffers_V: np.ndarray
    after: list[tuple[int, int]] = field(default_factory=list)


class _Buckets:
    """Follows one reduction of all gradients through the contiguous bucket.

    Attributes:
        owned: bytes of the gradients of this process' partitions that are kept so far.
    """

    def __init__(self, groups: list[Group], zero: ZeroSettings) -> None:
        self.zero = zero
        self.place = {slot.name: (group, slot) for group in groups for slot in group.slots}
        self.own = {
            slot.name
            for group, part in ((group, group.worst_part()) for group in groups)
            for slot in group.slots
            if part in dict(group.parts(slot))
        }
        whole = sum(self.place[name][1].size for name in self.own)
        self.partition_bytes = 0 if zero.offload else whole * zero.element
        self.owned = self.in_bucket = 0
        self.names: list[str] = []

    @property
    def buffer(self) -> int:
        """Bytes of the bucket itself."""
        return self.zero.reduce_bucket_size * self.zero.element * (1 + self.zero.overlap_comm)

    def add(self, name: str) -> tuple[int, int, int]:
        """Reduce what is full, then take a gradient in.

        Returns:
            Bytes of temporary copies while a full bucket was reduced (0 if none was), bytes of
            gradients outside the bucket that this freed, and bytes of the new gradient that stay
            outside the bucket because it is larger than that.
        """
        size = self.place[name][1].size
        full = self.in_bucket + size > self.zero.reduce_bucket_size and bool(self.names)
        spike, freed = self.flush() if full else (0, 0)
        self.names.append(name)
        self.in_bucket += size
        large = size > self.zero.reduce_bucket_size
        return spike, freed, size * self.zero.element if large else 0

    def flush(self) -> tuple[int, int]:
        """Reduce the bucket: (bytes of copies beside `owned`, bytes outside the bucket freed)."""
        spike = self._copies() * self.zero.element
        large = self.in_bucket > self.zero.reduce_bucket_size
        freed = self.in_bucket * self.zero.element if large else 0
        if self.own & set(self.names):
            # the copies are gone before the partition's gradients are first allocated
            spike = max(0, spike - (self.partition_bytes - self.owned))
            self.owned = self.partition_bytes
        if self.zero.offload:  # the norm of each gradient on its way to the host
            sizes = [self.place[name][1].size for name in self.own & set(self.names)]
            spike = max(spike, max(sizes, default=0) * NORM_BYTES)
        self.names, self.in_bucket = [], 0
        return spike, freed

    def _copies(self) -> int:
        """Elements of the flat copy of the slices that go to one process group."""
        slices: dict[bool, list[int]] = {}
        previous: tuple[bool, int] | None = None
        for name in self.names:
            group, slot = self.place[name]
            for part, size in group.parts(slot):
                if previous == (group.expert, part):
                    slices[group.expert][-1] += size
                else:
                    slices.setdefault(group.expert, []).append(size)
                previous = (group.expert, part)
        return max((sum(found) for found in slices.values() if len(found) > 1), default=0)


def overlay(
    groups: list[Group],
    *,
    zero: ZeroSettings,
    frozen_bytes: int,
    marks: Iterable[tuple[int, str]],
    moments: int,
) -> Overlay:
    """What the engine holds at each moment of a timeline.

    Args:
        groups: see `optimizer_groups`.
        zero: the layout.
        frozen_bytes: weights outside the groups, and the model's buffers.
        marks: when which gradient is complete; other names are passed over.
        moments: V.
    """
    element = zero.element
    trainable = sum(group.padded if zero.stage else group.size for group in groups)
    weights = frozen_bytes + trainable * element
    parts = sum(group.partition for group in groups)
    largest = max((slot.size for group in groups for slot in group.slots), default=0)
    state, host = 3 * FLOAT32 * parts, 0
    if zero.stage == 0:
        state = 2 * FLOAT32 * trainable
    elif zero.offload:  # state, gradient, weights on their way back, the largest gradient
        host = (4 * FLOAT32 + element) * parts + element * largest
        state = element * largest  # the same temporary buffer on the device
    copy = max((group.padded for group in groups), default=0) * element if zero.stage else 0
    empty = np.zeros(moments, dtype=np.int64)
    found = Overlay(weights, state, host, weights + copy, empty, empty.copy())
    if zero.stage == 2:
        _partition_gradients(found, groups, zero=zero, marks=marks)
    else:
        _keep_gradients(found, groups, zero=zero, marks=marks)
    return found


def _keep_gradients(
    found: Overlay, groups: list[Group], *, zero: ZeroSettings, marks: Iterable[tuple[int, str]]
) -> None:
    """Stages 0 and 1: every gradient stays until the step, and is reduced when all are there."""
    sizes = {slot.name: slot.size * zero.element for group in groups for slot in group.slots}
    total = sum(sizes.values())
    buckets = _Buckets(groups, zero) if zero.stage else None
    held = total if zero.accumulation > 1 else 0
    found.gradients_V[:] = held
    begun = zero.accumulation > 1
    if buckets and begun:
        found.buffers_V[:] = buckets.buffer
    for moment, name in marks:
        if name not in sizes:
            continue
        if buckets and not begun:
            found.buffers_V[moment:] = buckets.buffer
            begun = True
        if zero.accumulation == 1:
            found.gradients_V[moment + 1 :] += sizes[name]
    if buckets is None:
        by_kind = [
            sum(group.size for group in groups if group.expert is kind) for kind in (False, True)
        ]
        flat = min(max(by_kind), FALLBACK_BUCKET) * zero.element
        largest = max(sizes.values(), default=0)
        found.after += [(total, flat), (total, largest if zero.clips else 0)]
        return
    outside = total
    for group in groups:
        for slot in group.slots:
            spike, freed, large = buckets.add(slot.name)
            found.after.append((outside + buckets.owned, buckets.buffer + spike))
            outside -= freed + (0 if large else sizes[slot.name])
    spike, _ = buckets.flush()
    found.after.append((max(outside, 0) + buckets.owned, buckets.buffer + spike))
    _step(found, groups, zero=zero, held=buckets.owned)


def _partition_gradients(
    found: Overlay, groups: list[Group], *, zero: ZeroSettings, marks: Iterable[tuple[int, str]]
) -> None:
    """Stage 2: gradients go through the bucket at once; only the own partition is kept."""
    buckets = _Buckets(groups, zero)
    kept = buckets.partition_bytes if zero.accumulation > 1 else 0  # of earlier micro-batches
    if zero.offload and zero.accumulation > 1:
        whole = sum(buckets.place[name][1].size for name in buckets.own)
        found.host += whole * zero.element
    found.gradients_V[:] = kept
    begun, outside = False, 0
    for moment, name in marks:
        if name not in buckets.place:
            continue
        if not begun:
            found.buffers_V[moment:] = buckets.buffer
            begun = True
        spike, freed, large = buckets.add(name)
        found.gradients_V[moment] = kept + buckets.owned + outside
        found.buffers_V[moment] = buckets.buffer + spike
        outside += large - freed
        found.gradients_V[moment + 1 :] = kept + buckets.owned + outside
    spike, _ = buckets.flush()
    found.after.append((kept + buckets.owned + outside, buckets.buffer + spike))
    _step(found, groups, zero=zero, held=max(buckets.owned, kept))


def _step(found: Overlay, groups: list[Group], *, zero: ZeroSettings, held: int) -> None:
    """The optimizer's step, group by group: flat gradients, and in float32 if they are not yet."""
    if zero.offload:
        return
    for group in groups:
        several = len(group.slots) > 1
        flat = group.partition * zero.element if several else 0
        wide = group.partition * FLOAT32 if zero.half else 0
        found.after.append((held, flat + wide))
        largest = max(slot.size for slot in group.slots)
        found.after.append((held, min(largest, group.partition) * NORM_BYTES))
