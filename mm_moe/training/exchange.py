"""Bytes between processes, arithmetic, and the shortest time that a step can take.

Bytes are those that one process sends in one optimizer step. Processes have consecutive ranks on a
node, and an expert-parallel group is P consecutive ranks.

T routed tokens, D width, F hidden width, K choices, P processes of an expert-parallel group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mm_moe.training.zero_memory import Group, ZeroSettings

# bf16 without sparsity, FLOP/s, and memory in GiB; float32 runs as TF32 at half of it
GPUS: dict[str, tuple[float, float]] = {
    "A100": (312e12, 80),
    "H100": (989e12, 80),
    "H100-PCIE": (756e12, 80),
    "H200": (989e12, 141),
    "B200": (2250e12, 180),
    "MI300X": (1300e12, 192),
}
PASSES = 4  # exchanges of a row's width: out and back, forward and backward
RECOMPUTED_PASSES = 6  # and forward again


@dataclass(frozen=True)
class Traffic:
    """Bytes that one process sends.

    Attributes:
        near: to processes of its own node.
        far: to other nodes.
    """

    near: float = 0.0
    far: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.near + other.near, self.far + other.far)

    def times(self, factor: float) -> Traffic:
        """As often as that."""
        return Traffic(self.near * factor, self.far * factor)

    def seconds(self, link: Links) -> float:
        """The least time, one kind after the other."""
        return self.near / link.near + self.far / link.far


@dataclass(frozen=True)
class Links:
    """What a process can send, bytes per second, one direction.

    Attributes:
        near: within the node (NVLink).
        far: between nodes (its share of the network cards).
    """

    near: float = 450e9
    far: float = 50e9


def all_to_all(bytes_out: float, *, ep_size: int, gpus_per_node: int) -> Traffic:
    """Rows that are spread evenly over the processes of an expert-parallel group.

    Counted for the process whose node holds the fewest of its group.
    """
    near = min(
        sum(
            1 for peer in _group_of(rank, ep_size) if peer // gpus_per_node == rank // gpus_per_node
        )
        for rank in range(ep_size * gpus_per_node)
    )
    each = bytes_out / ep_size
    return Traffic(each * (near - 1), each * (ep_size - near))


def _group_of(rank: int, ep_size: int) -> range:
    first = rank // ep_size * ep_size
    return range(first, first + ep_size)


def all_reduce(size: float, *, ranks: int, stride: int, gpus_per_node: int) -> Traffic:
    """Sum over processes that are `stride` apart, within nodes first: 2 (n-1)/n of it is sent."""
    if ranks == 1:
        return Traffic()
    near, nodes = _spread(ranks, stride, gpus_per_node)
    total = 2 * size * (ranks - 1) / ranks
    far = 2 * size * (nodes - 1) / nodes / near
    return Traffic(max(0.0, total - far), far)


def all_gather(size: float, *, ranks: int, stride: int, gpus_per_node: int) -> Traffic:
    """Each process gets the parts of all others; `size` is the whole."""
    return all_reduce(size, ranks=ranks, stride=stride, gpus_per_node=gpus_per_node).times(0.5)


def _spread(ranks: int, stride: int, gpus_per_node: int) -> tuple[int, int]:
    """(members of a group on one node, nodes of the group)."""
    near = max(1, min(ranks, gpus_per_node // stride))
    return near, -(-ranks // near)


@dataclass(frozen=True)
class SparseLayer:
    """What one sparse layer does with a micro-batch.

    Attributes:
        tokens: T, real tokens of this process.
        width: D.
        hidden: F.
        top_k: K.
        recomputed: whether its block is computed again in the backward pass.
    """

    tokens: float
    width: int
    hidden: int
    top_k: int
    recomputed: bool = False

    @property
    def sent(self) -> float:
        """Values that its rows carry in a micro-batch, all ways."""
        passes = RECOMPUTED_PASSES if self.recomputed else PASSES
        return self.top_k * self.tokens * self.width * passes


def expert_traffic(
    layers: list[SparseLayer], *, zero: ZeroSettings, gpus_per_node: int, imbalance: float
) -> Traffic:
    """All-to-all of one step: rows out and back, forward and backward, in every micro-batch."""
    values = sum(layer.sent for layer in layers)
    out = values * zero.element * zero.accumulation * imbalance
    return all_to_all(out, ep_size=zero.ep_size, gpus_per_node=gpus_per_node)


def gradient_traffic(
    groups: list[Group], *, zero: ZeroSettings, gpus_per_node: int
) -> dict[str, Traffic]:
    """Reduction of dense and of expert gradients; DeepSpeed 0.19.8 reduces to all ranks.

    Stage 2 does so after every micro-batch, the others once in a step.
    """
    times = zero.accumulation if zero.stage == 2 else 1
    found = {"dense gradients": Traffic(), "expert gradients": Traffic()}
    for group in groups:
        name = "expert gradients" if group.expert else "dense gradients"
        stride = zero.ep_size if group.expert else 1
        size = group.size * zero.element
        more = all_reduce(size, ranks=group.ranks, stride=stride, gpus_per_node=gpus_per_node)
        found[name] += more.times(times)
    return found


def weight_traffic(groups: list[Group], *, zero: ZeroSettings, gpus_per_node: int) -> Traffic:
    """The gathering of updated weights at the end of a step, at stage 1 and 2."""
    total = Traffic()
    for group in groups if zero.stage else ():
        stride = zero.ep_size if group.expert else 1
        size = group.padded * zero.element
        total += all_gather(size, ranks=group.ranks, stride=stride, gpus_per_node=gpus_per_node)
    return total


def balance_width(*, ep_size: int, gpus_per_node: int, peak: float, links: Links, element: int):
    """F*: the hidden width at which an expert computes as long as its rows travel, forward.

    A row is D elements there and back and 4 D F operations; source: comparison of the two times.
    Wider experts compute longer than they exchange. 0 without exchange.
    """
    share = all_to_all(1.0, ep_size=ep_size, gpus_per_node=gpus_per_node)
    return element * peak / 2 * share.seconds(links)


@dataclass(frozen=True)
class StepTime:
    """Least seconds of one step.

    Attributes:
        compute: all arithmetic at the peak rate.
        exchange: all bytes at the full rate of the links.
    """

    compute: float
    exchange: float

    @property
    def ratio(self) -> float:
        """Exchange relative to compute."""
        return self.exchange / self.compute if self.compute else 0.0

    @property
    def overlapped(self) -> float:
        """If all exchange hides behind arithmetic: no step is faster."""
        return max(self.compute, self.exchange)

    @property
    def serial(self) -> float:
        """If none does."""
        return self.compute + self.exchange


def step_time(
    traffic: Mapping[str, Traffic], *, flops: float, peak: float, links: Links
) -> StepTime:
    """Lower bounds of one step's time."""
    return StepTime(flops / peak, sum(part.seconds(links) for part in traffic.values()))
