"""What a model's forward pass returns.

Axes: B samples, D width of a feature, C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput

from mm_moe.models.interaction_head import InteractionOutput
from mm_moe.moe.layer import RoutingRecord


@dataclass
class MultimodalMoEOutput(ModelOutput):
    """What a forward pass returns.

    Attributes:
        logits: (B, C), None without a head.
        features: modality -> (B, D), zero rows where the modality is absent, not generated and not
            filled.
        losses: terms to add to the objective, coefficients applied: those of the routers averaged
            over the towers' sparse layers, and those of the prompt and of the fill.
        routing: "<modality>.<block>" -> record of each sparse layer; the interaction experts'
            comes last, as "interaction.0".
        interaction: what the interaction experts say, in a model that has them.
    """

    logits: Tensor | None = None
    features: dict[str, Tensor] = None  # type: ignore[assignment]  # the library wants defaults
    losses: dict[str, Tensor] = None  # type: ignore[assignment]
    routing: dict[str, RoutingRecord] = None  # type: ignore[assignment]
    interaction: InteractionOutput | None = None


def mean_router_losses(routing: dict[str, RoutingRecord]) -> dict[str, Tensor]:
    """Mean over the sparse layers, so that a coefficient means the same at any depth."""
    losses: dict[str, Tensor] = {}
    for record in routing.values():
        for name, loss in record.losses.items():
            losses[name] = losses.get(name, 0.0) + loss / len(routing)
    return losses
