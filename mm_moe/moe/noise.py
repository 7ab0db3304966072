"""Noise that belongs to a token's place in the whole batch, not to a rank.

A rank that draws from its own generator would give a token other noise at another number of ranks.
Here a value is a function of (seed, place, column), so any split of the batch sees the same noise.

T tokens, E columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_HIGH = 1 << 62
GatherOverRanks = Callable[[Tensor], tuple[Tensor, int]]


@dataclass(frozen=True)
class Noise:
    """The noise that a router wants.

    Attributes:
        draw: (seed, places (T,), columns) -> values (T, columns): one of the functions below.
        columns: values per token.
    """

    draw: Callable[[int, Tensor, int], Tensor]
    columns: int

    def of_batch(
        self, num_tokens: int, *, device: torch.device, gather_over_ranks: GatherOverRanks
    ) -> Tensor:
        """Values (T, columns) of this rank's tokens, by place in the whole batch.

        The seed is the first rank's. One collective, the same for every number of tokens.
        """
        mine = torch.tensor([[draw_seed(), num_tokens]], device=device)
        seed_and_count_R2, rank = gather_over_ranks(mine)
        start = seed_and_count_R2[:rank, 1].sum()
        place_T = torch.arange(num_tokens, device=device) + start
        return self.draw(int(seed_and_count_R2[0, 0]), place_T, self.columns)


def _as_int64(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele et al. 2014): int64 to well-mixed int64."""
    x = (x ^ _shifted(x, 30)) * _as_int64(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _as_int64(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _uniform(counter: Tensor) -> Tensor:
    """Float64 in (0, 1) from 53 bits of a mixed counter."""
    return (_shifted(_mix(counter), 11).double() + 0.5) * 2.0**-53


def draw_seed() -> int:
    """A seed from torch's CPU generator, which a checkpoint stores and recomputation replays."""
    return int(torch.randint(_HIGH, ()).item())


def _counters(seed: int, places_T: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
    """Where a seed starts to count, and the number (T, E) of each value."""
    column_E = torch.arange(num_columns, device=places_T.device)
    start = _mix(torch.tensor(seed, device=places_T.device))
    return start, places_T.unsqueeze(1) * num_columns + column_E


def uniform_by_place(seed: int, places_T: Tensor, num_columns: int) -> Tensor:
    """Values (T, E) float64 between 0 and 1 (neither is reached) of places in the batch."""
    start, counter_TE = _counters(seed, places_T, num_columns)
    return _uniform(start + counter_TE)


def gumbel_by_place(seed: int, places_T: Tensor, num_columns: int) -> Tensor:
    """Standard Gumbel values (T, E) float64 of places in the batch."""
    return -(-uniform_by_place(seed, places_T, num_columns).log()).log()


def normal_by_place(seed: int, places_T: Tensor, num_columns: int) -> Tensor:
    """Standard normal values (T, E) float64 of places (int64) in the batch, by Box-Muller."""
    start, counter_TE = _counters(seed, places_T, num_columns)
    counter_TE = 2 * counter_TE
    radius_TE = (-2 * _uniform(start + counter_TE).log()).sqrt()
    return radius_TE * (2 * math.pi * _uniform(start + counter_TE + 1)).cos()
