"""What a fill is: it puts tokens where a sample lacks a modality, after the towers have run.

A fill sees encoded tokens and presence, never payloads, and knows no ranks. All cells that a batch
lacks are one call, in the order of samples and then modalities, so that a process' cells follow
those of the process before it. A process without any makes the same collectives.

Axes: B samples, M modalities, P tokens of a modality, H their width, Q cells (sample, modality)
that the batch lacks, S support rows of one modality, N supports drawn for one cell.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mm_moe.errors import ConfigError, DataError
from mm_moe.moe.layer import MoELayer, RoutingRecord


@dataclass(frozen=True)
class FillShape:
    """What a fill has to know of the model.

    Attributes:
        modalities: in the model's fixed order.
        num_tokens: P.
        width: H.
    """

    modalities: tuple[str, ...]
    num_tokens: int
    width: int


@dataclass(frozen=True)
class SupportTokens:
    """Encoded training rows that have one modality, for the samples that lack it.

    Attributes:
        tokens_SPH: of that modality.
        rows_QN: int64, places among the S rows for each sample that lacks the modality, in the
            order of the batch; -1 is padding.
        present_SM: which modalities each row has.
        index_S: int64, each row's number in the training split, by which a fill finds the row among
            the supports of other modalities; None where the batch does not say.
    """

    tokens_SPH: Tensor
    rows_QN: Tensor
    present_SM: Tensor
    index_S: Tensor | None = None


@dataclass(frozen=True)
class Cells:
    """The cells that a batch lacks, sample by sample, and what there is to fill them from.

    Attributes:
        tokens_BMPH: encoded tokens, zero in missing cells.
        present_BM: which there are.
        sample_Q: the cells' samples.
        modality_Q: their modalities.
        supports: by modality.
    """

    tokens_BMPH: Tensor
    present_BM: Tensor
    sample_Q: Tensor
    modality_Q: Tensor
    supports: Mapping[str, SupportTokens]


@dataclass(frozen=True)
class Filled:
    """What a fill gives back.

    Attributes:
        tokens: modality -> (B, P, H), those of present cells as they were.
        losses: "fill_<name>" -> scalar to add to the objective, coefficients applied.
        routing: "fill.<i>" -> record of each sparse layer of the fill.
    """

    tokens: dict[str, Tensor]
    losses: dict[str, Tensor]
    routing: dict[str, RoutingRecord]


class Fill(nn.Module, ABC):
    """Base of all fills.

    A new fill implements `make` in one file and adds one line to the registry; the keyword
    arguments of its constructor are its options.

    Args:
        shape: of the model's tokens.
        warm_up_steps: optimizer steps through which missing tokens stay exactly 0 and the fill's
            losses 0, while its parts run all the same. (With weight decay its weights shrink a
            little in that time.)

    Attributes:
        needs_supports: whether a batch has to bring support rows.
        needs_whole: whether these with all modalities that they have.
        num_supports: how many rows the data draw for a cell; None: as many as the sample has
            modalities.

    Raises:
        ConfigError: an option that cannot work.
    """

    needs_supports: ClassVar[bool] = False
    needs_whole: ClassVar[bool] = False
    num_supports: int | None = None
    steps_done: Tensor

    def __init__(self, shape: FillShape, *, warm_up_steps: int = 0) -> None:
        super().__init__()
        self.shape = shape
        self.warm_up_steps = whole("warm_up_steps", warm_up_steps, least=0)
        if warm_up_steps:
            self.register_buffer("steps_done", torch.zeros((1,), dtype=torch.int64))

    @torch.no_grad()
    def set_steps(self, steps: int) -> None:
        """Say how many optimizer steps are done; training does after each of them."""
        if self.warm_up_steps:
            self.steps_done.fill_(steps)

    def forward(
        self,
        tokens: Mapping[str, Tensor],
        present_BM: Tensor,
        supports: Mapping[str, SupportTokens] | None = None,
    ) -> Filled:
        """Fill what the samples lack.

        Args:
            tokens: modality -> (B, P, H), zero where the sample lacks the modality.
            present_BM: bool (B, M).
            supports: modality -> its support rows; modalities that no sample lacks may be left out.

        Raises:
            DataError: a fill that needs supports was given none, or not those of this batch.
        """
        names = self.shape.modalities
        tokens_BMPH = torch.stack([tokens[name] for name in names], 1)
        sample_Q, modality_Q = (~present_BM).nonzero().unbind(1)
        self._check_supports(len(sample_Q), present_BM, supports)
        cells = Cells(tokens_BMPH, present_BM, sample_Q, modality_Q, supports or {})
        made = self.make(cells)
        if made is None:
            return Filled(dict(tokens), {}, {})
        new_QPH, records = made
        open_ = self._open(new_QPH)
        filled_BMPH = tokens_BMPH.index_put(
            (sample_Q, modality_Q), (new_QPH * open_).to(tokens_BMPH.dtype)
        )
        losses: dict[str, Tensor] = {}
        for record in records.values():
            for name, loss in record.losses.items():
                losses[f"fill_{name}"] = losses.get(f"fill_{name}", 0) + loss * open_
        return Filled(dict(zip(names, filled_BMPH.unbind(1), strict=True)), losses, records)

    @abstractmethod
    def make(self, cells: Cells) -> tuple[Tensor, dict[str, RoutingRecord]] | None:
        """Tokens (Q, P, H) for the cells and records of sparse layers; None leaves zeros.

        Q may be 0; sparse layers then run on rows without a real token.
        """

    @classmethod
    def count_experts(cls, num_modalities: int, options: Mapping[str, Any]) -> int:
        """Experts of its sparse layers with these options, which every layout must divide; 0: none.

        Raises:
            ConfigError: an option that cannot work.
        """
        return 0

    def sparse_layers(self) -> dict[str, MoELayer]:
        """The sparse layers by the names of their routing records."""
        return {}

    def _open(self, like: Tensor) -> Tensor:
        """1, or 0 while warming up; a tensor, so that a device is not asked for its value."""
        if not self.warm_up_steps:
            return like.new_ones(())
        return (self.steps_done[0] >= self.warm_up_steps).to(like.dtype)

    def _check_supports(
        self, num_cells: int, present_BM: Tensor, supports: Mapping[str, SupportTokens] | None
    ) -> None:
        if not self.needs_supports or not num_cells:
            return
        if supports is None:
            raise DataError(
                f"{type(self).__name__} fills from training rows, and the batch brings no "
                f"'supports' for the {num_cells} modalities that its samples lack; hand the model "
                "the batches of a collator with supports, or complete samples."
            )
        for m, name in enumerate(self.shape.modalities):
            lacking = int((~present_BM[:, m]).sum())
            given = len(supports[name].rows_QN) if name in supports else lacking
            if given != lacking:
                raise DataError(
                    f"the batch brings supports of {name!r} for {given} samples, but {lacking} of "
                    f"its {len(present_BM)} samples lack it; build supports and presence together."
                )


def support_table(cells: Cells, modalities: tuple[str, ...]) -> tuple[Tensor, Tensor, list[int]]:
    """One table of all support rows, and each cell's places in it.

    Returns:
        Tokens (S + 1, P, H) of the supports of all modalities, the last row zero; places (Q, N) in
        it, of which padding is S; and where each modality's rows start.
    """
    _, _, num_tokens, width = cells.tokens_BMPH.shape
    parts, starts, count = [], [], 0
    for name in modalities:
        starts.append(count)
        if name in cells.supports:
            parts.append(cells.supports[name].tokens_SPH)
            count += len(parts[-1])
    zero_1PH = cells.tokens_BMPH.new_zeros(1, num_tokens, width)
    longest = max([1, *(s.rows_QN.shape[1] for s in cells.supports.values())])
    place_QN = cells.sample_Q.new_full((len(cells.sample_Q), longest), count)
    for m, name in enumerate(modalities):
        if name in cells.supports:
            rows_QN = cells.supports[name].rows_QN
            own_Q = (cells.modality_Q == m).nonzero().squeeze(1)
            placed_QN = torch.where(rows_QN >= 0, rows_QN + starts[m], count)
            placed_QN = torch.nn.functional.pad(
                placed_QN, (0, longest - rows_QN.shape[1]), value=count
            )
            place_QN = place_QN.index_copy(0, own_Q, placed_QN)
    return torch.cat([*parts, zero_1PH]), place_QN, starts


def whole(name: str, value: Any, *, least: int) -> int:
    """An option that must be a whole number.

    Raises:
        ConfigError: it is not, or too small.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"fill_config.{name} ({value!r}) must be a whole number from {least}.")
    return value


def number(name: str, value: Any, *, least: float = 0.0, most: float = math.inf) -> float:
    """An option that must be a finite number in a range.

    Raises:
        ConfigError: it is not.
    """
    right = isinstance(value, int | float) and not isinstance(value, bool)
    if not right or not math.isfinite(value) or not least <= value <= most:
        above = f"from {least:g}" if most == math.inf else f"in {least:g} to {most:g}"
        raise ConfigError(f"fill_config.{name} ({value!r}) must be a number {above}.")
    return float(value)


def flag(name: str, value: Any) -> bool:
    """An option that must be true or false.

    Raises:
        ConfigError: it is not.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"fill_config.{name} ({value!r}) must be true or false.")
    return value
