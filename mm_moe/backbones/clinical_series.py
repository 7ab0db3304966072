"""From clinical time series to P tokens: regular steps, and events at irregular times.

Axes: N rows, L steps or events (padded on the right), D width of a step, V variables, B bins of
time, P tokens, H width of a token.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_moe.backbones.base import Payload
from mm_moe.backbones.clinical_tokens import (
    AttentionPool,
    RawInput,
    TokenEncoder,
    TokenShape,
    run_block,
)
from mm_moe.backbones.sequences import SequenceBlock
from mm_moe.errors import ConfigError, DataError

EVENT_WIDTH = 3  # hours, place of the variable, value
NUM_WAVES = 8  # of the time encoding: the longest is two windows, the shortest two windows / 128


class SeriesEncoder(TokenEncoder):
    """Base of the encoders of regular series: what they read is checked here.

    A cell that is NaN was not observed: it becomes 0 (the mean, once standardised), and a flag
    beside every cell tells it from a real 0.
    """

    def __init__(self, raw: RawInput, shape: TokenShape) -> None:
        super().__init__()
        if not raw.sequence:
            raise ConfigError(
                f"clinical.towers.{raw.name}: a series takes (L, D) with a mask, the rows are "
                f"arrays {raw.shape}; take kind table or volume."
            )
        self.length, self.raw_width = raw.shape
        self.num_tokens = shape.num_tokens
        self.steps = -(-self.length // shape.num_tokens)  # of one token

    def flagged(self, payload: Payload) -> tuple[Tensor, Tensor]:
        """Values with their flags (N, P * steps, 2D) and the mask (N, P * steps)."""
        values_NLD, mask_NL = payload["values"], payload["mask"]
        if values_NLD.shape[2] != self.raw_width or values_NLD.shape[1] > self.length:
            raise DataError(
                f"a series of {values_NLD.shape[1]} steps of width {values_NLD.shape[2]} does not "
                f"fit the encoder's {self.length} of width {self.raw_width}; use this model's own "
                "data."
            )
        behind = self.num_tokens * self.steps - values_NLD.shape[1]
        values_NLD, mask_NL = F.pad(values_NLD, (0, 0, 0, behind)), F.pad(mask_NL, (0, behind))
        seen_NLD = values_NLD.isfinite() & mask_NL[..., None]
        flags_NLD = seen_NLD.to(values_NLD.dtype)
        return torch.cat([torch.where(seen_NLD, values_NLD, 0.0), flags_NLD], -1), mask_NL

    def blank(self) -> Payload:
        """One step of zeros."""
        weight = next(self.parameters())
        return {
            "values": weight.new_zeros(1, 1, self.raw_width),
            "mask": torch.ones(1, 1, dtype=torch.bool, device=weight.device),
        }


class GruTokens(SeriesEncoder):
    """A GRU over the steps; a token is the mean state of its share of the time.

    Token p stands for steps p * ceil(L / P) to the next one's first; a share without a real step
    gives zeros.
    """

    def __init__(self, raw: RawInput, shape: TokenShape) -> None:
        super().__init__(raw, shape)
        self.gru = nn.GRU(2 * self.raw_width, shape.width, batch_first=True)

    def forward(self, payload: Payload) -> Tensor:
        """(N, P, H)."""
        x_NLD, mask_NL = self.flagged(payload)
        states_NLH = torch.where(mask_NL[..., None], self.gru(x_NLD)[0], 0.0)
        shares_NPSH = states_NLH.unflatten(1, (self.num_tokens, self.steps))
        counts_NP = mask_NL.unflatten(1, (self.num_tokens, self.steps)).sum(2).clamp(min=1)
        return shares_NPSH.sum(2) / counts_NP[..., None]


class PatchTokens(SeriesEncoder):
    """The steps of each P-th of the time, side by side, through one linear layer.

    A convolution over time whose kernel and stride are ceil(L / P) steps.
    """

    def __init__(self, raw: RawInput, shape: TokenShape) -> None:
        super().__init__(raw, shape)
        self.project = nn.Linear(2 * self.steps * self.raw_width, shape.width)

    def forward(self, payload: Payload) -> Tensor:
        """(N, P, H)."""
        x_NLD, _ = self.flagged(payload)
        return self.project(x_NLD.unflatten(1, (self.num_tokens, self.steps)).flatten(2))


class EventEncoder(TokenEncoder):
    """Base of the encoders of irregular events; payload: values (N, L, 3), mask bool (N, L).

    An event is (hours since the start of the window, place of its variable, value), see
    `mm_moe.data.events`. Values are standardised here, each by its variable's training mean and
    spread, which a checkpoint holds.
    """

    mean_V: Tensor
    std_V: Tensor

    def __init__(self, raw: RawInput, shape: TokenShape) -> None:
        super().__init__()
        about = raw.events
        if not about or not about.get("variables"):
            raise ConfigError(
                f"clinical.towers.{raw.name}: an encoder of events needs the variables' names; "
                f'give sequences.{raw.name}.events = {{"variables": [...], "mean": [...], '
                '"std": [...], "hours": 48}.'
            )
        count = len(about["variables"])
        mean, std = (about.get(key) or [value] * count for key, value in (("mean", 0), ("std", 1)))
        hours = float(about.get("hours") or 0)
        if len(mean) != count or len(std) != count or min(std) <= 0 or hours <= 0:
            raise ConfigError(
                f"clinical.sequences.{raw.name}.events: {count} variables need as many means and "
                f"spreads above 0 (there are {len(mean)} and {len(std)}), and hours above 0 "
                f"({hours:g}), the width of the window."
            )
        self.num_variables, self.hours, self.num_tokens = count, hours, shape.num_tokens
        self.register_buffer("mean_V", torch.tensor(mean, dtype=torch.get_default_dtype()))
        self.register_buffer("std_V", torch.tensor(std, dtype=torch.get_default_dtype()))

    def events(self, payload: Payload) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Share of the window that has gone by, variable, standardised value, mask: (N, L) each.

        Raises:
            DataError: an event of a variable that the model does not know.
        """
        values_NL3, mask_NL = payload["values"], payload["mask"]
        place_NL = torch.where(mask_NL, values_NL3[..., 1], 0.0).long()
        self.check(place_NL)
        share_NL = (torch.where(mask_NL, values_NL3[..., 0], 0.0) / self.hours).clamp(0, 1)
        value_NL = (values_NL3[..., 2] - self.mean_V[place_NL]) / self.std_V[place_NL]
        return share_NL, place_NL, torch.where(mask_NL, value_NL, 0.0), mask_NL

    def check(self, place_NL: Tensor) -> None:
        """Refuse an unknown variable. It looks at values, so a planned pass leaves it out.

        Raises:
            DataError: says which variables there are.
        """
        if len(place_NL) and not 0 <= int(place_NL.min()) <= int(place_NL.max()) < (
            self.num_variables
        ):
            raise DataError(
                f"events must be [hours, variable 0 to {self.num_variables - 1}, value]; the batch "
                f"has variables {int(place_NL.min())} to {int(place_NL.max())}. Use this model's "
                "own data."
            )

    def blank(self) -> Payload:
        """One event at the start."""
        return {
            "values": self.mean_V.new_zeros(1, 1, EVENT_WIDTH),
            "mask": torch.ones(1, 1, dtype=torch.bool, device=self.mean_V.device),
        }


class EventSet(EventEncoder):
    """Events as a set: variable, value and time each embedded and added, then attention.

    `layers` transformer blocks let events see each other (their cost grows with the square of the
    number of events; 0: none), and P learned queries read the set. The order of the events has no
    part in it.

    Source: STraTS (Tipirneni and Reddy 2022), with sines of the time beside the time itself, and P
    queries for its one.
    """

    options: ClassVar[Mapping[str, int]] = MappingProxyType({"layers": 0})

    def __init__(self, raw: RawInput, shape: TokenShape, *, layers: int = 1) -> None:
        super().__init__(raw, shape)
        width = shape.width
        self.variable = nn.Embedding(self.num_variables, width)
        self.value = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, width))
        self.time = nn.Linear(1 + 2 * NUM_WAVES, width)
        self.mix = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.blocks = nn.ModuleList(
            SequenceBlock(width=width, hidden=2 * width) for _ in range(layers)
        )
        self.num_heads = shape.num_heads
        self.pool = AttentionPool(width, shape)

    def forward(self, payload: Payload) -> Tensor:
        """(N, P, H)."""
        share_NL, place_NL, value_NL, mask_NL = self.events(payload)
        time_NLH = self.time(time_features(share_NL))
        x_NLH = self.variable(place_NL) + self.value(value_NL[..., None]) + time_NLH
        x_NLH = x_NLH + self.mix(x_NLH)
        for block in self.blocks:
            x_NLH, _ = run_block(
                block,  # type: ignore[arg-type]
                x_NLH,
                num_heads=self.num_heads,
                mask_NL=mask_NL,
            )
        return self.pool(x_NLH, mask_NL)


class EventBins(EventEncoder):
    """Events on a grid: the mean of each variable in each bin of time, its last value carried on.

    Beside every mean stands whether the bin has a value of its own, and what was never seen is 0,
    the training mean. A GRU goes over the bins (`gru` 0: one linear layer per bin), and bins that
    are neighbours are averaged into P tokens.

    Args:
        raw: the modality.
        shape: of the tokens.
        bins: B, equal parts of the window; 0: P.
        gru: whether a GRU goes over them.
    """

    options: ClassVar[Mapping[str, int]] = MappingProxyType({"bins": 0, "gru": 0})

    def __init__(self, raw: RawInput, shape: TokenShape, *, bins: int = 0, gru: int = 1) -> None:
        super().__init__(raw, shape)
        self.bins = bins or shape.num_tokens
        width = 2 * self.num_variables
        self.per_bin = nn.GRU(width, shape.width, batch_first=True) if gru else None
        self.project = None if gru else nn.Linear(width, shape.width)

    def grid(self, payload: Payload) -> Tensor:
        """Means carried on, and flags (N, B, 2V)."""
        share_NL, place_NL, value_NL, mask_NL = self.events(payload)
        bin_NL = (share_NL * self.bins).long().clamp(max=self.bins - 1)
        cell_NL = bin_NL * self.num_variables + place_NL
        zeros_NC = value_NL.new_zeros(len(value_NL), self.bins * self.num_variables)
        count_NC = zeros_NC.scatter_add(1, cell_NL, mask_NL.to(value_NL.dtype))
        mean_NC = zeros_NC.scatter_add(1, cell_NL, value_NL) / count_NC.clamp(min=1)
        mean_NBV = mean_NC.unflatten(1, (self.bins, self.num_variables))
        seen_NBV = count_NC.unflatten(1, (self.bins, self.num_variables)) > 0
        last_NV = torch.zeros_like(mean_NBV[:, 0])
        carried = []
        for b in range(self.bins):
            last_NV = torch.where(seen_NBV[:, b], mean_NBV[:, b], last_NV)
            carried.append(last_NV)
        return torch.cat([torch.stack(carried, 1), seen_NBV.to(mean_NBV.dtype)], -1)

    def forward(self, payload: Payload) -> Tensor:
        """(N, P, H)."""
        x_NBF = self.grid(payload)
        if self.per_bin is not None:
            x_NBH = self.per_bin(x_NBF)[0]
        else:
            assert self.project is not None
            x_NBH = self.project(x_NBF)
        return F.adaptive_avg_pool1d(x_NBH.transpose(1, 2), self.num_tokens).transpose(1, 2)


def time_features(share_NL: Tensor) -> Tensor:
    """Time as itself, and sines and cosines of doubling frequency (N, L, 1 + 2 waves)."""
    waves = math.pi * 2.0 ** torch.arange(NUM_WAVES, device=share_NL.device).to(share_NL.dtype)
    angle_NLW = share_NL[..., None] * waves
    return torch.cat([share_NL[..., None], angle_NLW.sin(), angle_NLW.cos()], -1)
