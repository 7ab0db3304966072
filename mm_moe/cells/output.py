"""What a forward pass of the cell autoencoder returns.

N cells, D latent width.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput

from mm_moe.moe.layer import RoutingRecord


@dataclass
class CellOutput(ModelOutput):
    """What a forward pass returns; cells are sorted by species, then as in the batch.

    Attributes:
        mu: mean of the posterior (N, D).
        logvar: logarithm of its variance (N, D).
        hidden: layer -> values of the core encoder's hidden layers.
        losses: name -> loss of each cell, or the parts of an objective.
        routing: nothing: no router decides where a cell goes.
    """

    mu: Tensor | None = None
    logvar: Tensor | None = None
    hidden: dict[str, Tensor] = None  # type: ignore[assignment]  # the library wants defaults
    losses: dict[str, Tensor] = None  # type: ignore[assignment]
    routing: dict[str, RoutingRecord] = None  # type: ignore[assignment]
