"""Encoders and decoders of one modality.

N rows, L latent width, V values of a row, C channels, H x W places.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mm_moe.errors import ConfigError
from mm_moe.registry import nearest

OPTIONS = {"mlp": ("hidden",), "cnn": ("channels",)}
DEFAULT_HIDDEN = (400,)
DEFAULT_CHANNELS = 32
HALVINGS = 2  # of a picture in a cnn


def check_network(name: str, options: Mapping[str, Any], shape: Sequence[int]) -> None:
    """Refuse a network that cannot be built.

    Raises:
        ConfigError: an unknown kind or option, a width below 1, or a shape that it does not take.
    """
    kind = str(options["kind"])
    if kind not in OPTIONS:
        raise ConfigError(f"unknown network {kind!r} of {name!r}; {nearest(kind, list(OPTIONS))}")
    for key in options:
        if key not in ("kind", *OPTIONS[kind]):
            known = ", ".join(OPTIONS[kind])
            raise ConfigError(
                f"unknown option {key!r} of networks.{name} ({kind}); it has {known}."
            )
    hidden = options.get("hidden", ())
    channels = options.get("channels", DEFAULT_CHANNELS)
    if not isinstance(hidden, list | tuple) or any(width < 1 for width in hidden) or channels < 1:
        raise ConfigError(
            f"networks.{name}: hidden ({hidden}) must be a list of widths from 1, channels "
            f"({channels}) a number from 1."
        )
    if kind == "cnn" and (
        len(shape) not in (2, 3) or any(side % 2**HALVINGS for side in shape[-2:])
    ):
        raise ConfigError(
            f"networks.{name}: a cnn halves pictures (H, W) or (C, H, W) {HALVINGS} times, the "
            f"rows are {tuple(shape)}; take kind mlp or sides that are multiples of "
            f"{2**HALVINGS}."
        )


class Encoder(nn.Module):
    """Rows to the location and the logits of the scale of their posterior.

    Args:
        shape: of one row.
        latent_size: L.
        options: of the network, checked.
    """

    def __init__(
        self, shape: Sequence[int], *, latent_size: int, options: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        if options["kind"] == "mlp":
            widths = [math.prod(shape), *options.get("hidden", DEFAULT_HIDDEN)]
            self.body: nn.Sequential = _perceptron(widths)
            width = widths[-1]
        else:
            channels = options.get("channels", DEFAULT_CHANNELS)
            into = shape[0] if len(shape) == 3 else 1
            self.body = nn.Sequential(
                nn.Unflatten(1, (into, *shape[-2:])),
                nn.Conv2d(into, channels, 4, stride=2, padding=1),
                nn.ReLU(),
                nn.Conv2d(channels, 2 * channels, 4, stride=2, padding=1),
                nn.ReLU(),
                nn.Flatten(),
            )
            width = 2 * channels * math.prod(side >> HALVINGS for side in shape[-2:])
        self.location = nn.Linear(width, latent_size)
        self.scale_logits = nn.Linear(width, latent_size)

    def forward(self, values_NV: Tensor) -> tuple[Tensor, Tensor]:
        """Location and logits of the scale, (N, L) each."""
        hidden_ND = self.body(values_NV)
        return self.location(hidden_ND), self.scale_logits(hidden_ND)


class Decoder(nn.Module):
    """Latents to what the likelihood of a row's values is made from, (N, V); mirrors `Encoder`."""

    def __init__(
        self, shape: Sequence[int], *, latent_size: int, options: Mapping[str, Any]
    ) -> None:
        super().__init__()
        values = math.prod(shape)
        if options["kind"] == "mlp":
            widths = [latent_size, *reversed(options.get("hidden", DEFAULT_HIDDEN))]
            self.body = nn.Sequential(*_perceptron(widths), nn.Linear(widths[-1], values))
            return
        channels = options.get("channels", DEFAULT_CHANNELS)
        small = (2 * channels, *(side >> HALVINGS for side in shape[-2:]))
        into = shape[0] if len(shape) == 3 else 1
        self.body = nn.Sequential(
            nn.Linear(latent_size, math.prod(small)),
            nn.ReLU(),
            nn.Unflatten(1, small),
            nn.ConvTranspose2d(2 * channels, channels, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(channels, into, 4, stride=2, padding=1),
            nn.Flatten(),
        )

    def forward(self, z_NL: Tensor) -> Tensor:
        """(N, V)."""
        return self.body(z_NL)


def _perceptron(widths: Sequence[int]) -> nn.Sequential:
    """Linear maps, each with a ReLU behind; nothing for one width."""
    layers: list[nn.Module] = []
    for into, out in itertools.pairwise(widths):
        layers += [nn.Linear(into, out), nn.ReLU()]
    return nn.Sequential(*layers)
