"""Normal noise that belongs to a token's place in the whole batch, not to a rank.

A rank that draws from its own generator would give a token other noise at another number of ranks.
Here a value is a function of (seed, place, column), so any split of the batch sees the same noise.

T tokens, E columns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_HIGH = 1 << 62


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


def normal_by_place(seed: int, places_T: Tensor, num_columns: int) -> Tensor:
    """Standard normal values (T, E) float64 of places (int64) in the batch, by Box-Muller."""
    column_E = torch.arange(num_columns, device=places_T.device)
    counter_TE = 2 * (places_T.unsqueeze(1) * num_columns + column_E)
    start = _mix(torch.tensor(seed, device=places_T.device))
    radius_TE = (-2 * _uniform(start + counter_TE).log()).sqrt()
    return radius_TE * (2 * math.pi * _uniform(start + counter_TE + 1)).cos()
