"""The encoders of the backbone `small`: a batch of rows in, one vector per row out.

Axes: N rows, L steps, D width, C channels, H x W places.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_moe.backbones.base import Payload
from mm_moe.errors import ConfigError, DataError
from mm_moe.moe.batch_norm import BatchNorm


class Encoder(nn.Module, ABC):
    """Rows of a fixed shape to vectors.

    Attributes:
        shape: of one row.
        out_width: of the vectors.
        options: names of the integer options -> least value.
    """

    options: ClassVar[Mapping[str, int]]
    shape: tuple[int, ...]
    out_width: int

    @abstractmethod
    def forward(self, payload: Payload) -> Tensor:
        """(N, out_width)."""

    def _rows(self, payload: Payload) -> Tensor:
        """Values (N, *shape); shorter sequences are padded with zeros on the right."""
        x = payload["values"] if "values" in payload else payload["pixel_values"]
        if "mask" in payload and x.ndim == 3 and x.shape[1] < self.shape[0]:
            x = F.pad(x, (0, 0, 0, self.shape[0] - x.shape[1]))
        if tuple(x.shape[1:]) != self.shape:
            raise DataError(
                f"a row has shape {tuple(x.shape[1:])}, the encoder takes {self.shape}; use this "
                "model's own data."
            )
        return x


class MlpEncoder(Encoder):
    """Linear - ReLU - linear on the flattened row."""

    options = MappingProxyType({"hidden": 1, "size": 1})

    def __init__(self, shape: tuple[int, ...], *, hidden: int = 10, size: int = 10) -> None:
        super().__init__()
        self.shape, self.out_width = shape, size
        width = math.prod(shape)
        self.layers = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, size))

    def forward(self, payload: Payload) -> Tensor:
        """(N, size)."""
        return self.layers(self._rows(payload).flatten(1))


class CnnEncoder(Encoder):
    """A LeNet: convolution - batch normalisation - ReLU - pooling by 2, over and over.

    The first convolution is 5 x 5 to `channels`, the others are 3 x 3 and double the channels;
    none has a bias. With the largest number of layers what is left is one place: 28 x 28 gives
    8 * channels values after 3 layers, 112 x 112 gives 32 * channels after 5.

    Args:
        shape: (H, W), or (C, H, W).
        channels: of the first convolution.
        layers: convolutions behind the first; 0: as many as the picture has halvings for.
    """

    options = MappingProxyType({"channels": 1, "layers": 0})

    def __init__(self, shape: tuple[int, ...], *, channels: int = 3, layers: int = 0) -> None:
        super().__init__()
        if len(shape) not in (2, 3):
            raise ConfigError(f"a cnn takes pictures (H, W) or (C, H, W), the rows are {shape}.")
        self.shape = shape
        height, width = shape[-2:]
        most = int(math.log2(min(height, width))) - 1
        if layers > most or most < 0:
            raise ConfigError(
                f"a cnn of {layers} layers halves the picture {layers + 1} times, which "
                f"{height} x {width} does not allow; take layers up to {most}."
            )
        layers = layers or most
        widths = [channels * 2**i for i in range(layers + 1)]
        ins = [shape[0] if len(shape) == 3 else 1, *widths]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(into, out, kernel, padding=kernel // 2, bias=False)
            for into, out, kernel in zip(ins, widths, [5] + [3] * layers, strict=False)
        )
        self.norms = nn.ModuleList(BatchNorm(out) for out in widths)
        for convolution in self.convolutions:
            nn.init.kaiming_uniform_(convolution.weight)  # type: ignore[arg-type]
        places = (height >> (layers + 1)) * (width >> (layers + 1))
        self.out_width = widths[-1] * places

    def forward(self, payload: Payload) -> Tensor:
        """(N, channels * 2**layers * places)."""
        x_NCHW = self._rows(payload)
        x_NCHW = x_NCHW.unsqueeze(1) if len(self.shape) == 2 else x_NCHW
        x_NCHW = x_NCHW.contiguous(memory_format=torch.channels_last)
        blank = "blank" in payload
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x_NCHW = F.max_pool2d(F.relu(norm(convolution(x_NCHW), blank=blank)), 2)
        return x_NCHW.flatten(1)


class GruEncoder(Encoder):
    """A GRU whose states, each through one linear layer if wanted, are laid side by side.

    States behind the end of a row are zeros.

    Args:
        shape: (L, D).
        hidden: width of a state.
        step_size: width that each state is projected to; 0: states are taken as they are.
    """

    options = MappingProxyType({"hidden": 1, "step_size": 0})

    def __init__(self, shape: tuple[int, ...], *, hidden: int = 30, step_size: int = 15) -> None:
        super().__init__()
        if len(shape) != 2:
            raise ConfigError(f"a gru takes series (L, D), the rows are {shape}.")
        self.shape = shape
        self.gru = nn.GRU(shape[1], hidden, batch_first=True)
        self.per_step = nn.Linear(hidden, step_size) if step_size else None
        self.out_width = shape[0] * (step_size or hidden)

    def forward(self, payload: Payload) -> Tensor:
        """(N, L * step_size)."""
        x_NLD = self._rows(payload)
        states_NLD = self.gru(x_NLD)[0]
        if self.per_step is not None:
            states_NLD = self.per_step(states_NLD)
        if "mask" in payload:
            mask_NL = payload["mask"]
            real_NL = F.pad(mask_NL, (0, x_NLD.shape[1] - mask_NL.shape[1]))
            states_NLD = torch.where(real_NL[..., None], states_NLD, 0.0)
        return states_NLD.flatten(1)


ENCODERS: Mapping[str, type[MlpEncoder] | type[CnnEncoder] | type[GruEncoder]] = MappingProxyType(
    {"mlp": MlpEncoder, "cnn": CnnEncoder, "gru": GruEncoder}
)
