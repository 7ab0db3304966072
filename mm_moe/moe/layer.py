"""The sparse feed-forward layer: the router decides, the dispatcher acts, the experts compute.

T real tokens, D width, E experts, K choices per token.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor, nn

from mm_moe.moe.balance import RoutingSums
from mm_moe.moe.capacity import within_capacity
from mm_moe.moe.companion import Residual, SharedExpert
from mm_moe.moe.context import TokenContext
from mm_moe.moe.dispatch import Dispatcher, LocalDispatcher
from mm_moe.moe.experts import Experts
from mm_moe.moe.router import Routing
from mm_moe.moe.settings import MoESettings
from mm_moe.registry import ROUTERS


@dataclass
class RoutingRecord:
    """What one sparse layer reports for one forward pass; returned, never parked on a module.

    Attributes:
        tokens_E: int64 (E,), rows that this process sent to each global expert.
        losses: name -> scalar, multiplied by its coefficient, over the tokens of all ranks.
        metrics: name -> detached scalar over the tokens of all ranks: `router_entropy` (mean, in
            nats), `router_z` (mean squared log-partition value), `dropped` (share of the choices)
            and `tokens` (how many there were).
        load_E: int64 (E,), choices for each global expert over all ranks, before any dropping: what
            a router's bias is updated by.
    """

    tokens_E: Tensor
    losses: dict[str, Tensor]
    metrics: dict[str, Tensor]
    load_E: Tensor | None = None


class MoELayer(nn.Module):
    """A feed-forward made of experts, all in this process unless the dispatcher says otherwise.

    Args:
        width: D.
        hidden: hidden width of each expert.
        settings: the layer's settings.
        activation: a name in `mm_moe.moe.experts.ACTIVATIONS`, gated or not.
    """

    def __init__(
        self, *, width: int, hidden: int, settings: MoESettings, activation: str = "gelu"
    ) -> None:
        super().__init__()
        self.width = width
        self.num_experts = settings.num_experts
        self.settings = settings
        self.router = ROUTERS.resolve(settings.router)(width=width, settings=settings)
        self.experts = Experts(
            num_experts=settings.num_experts, width=width, hidden=hidden, activation=activation
        )
        self.companion = _companion(width, hidden, settings, activation)
        self.dispatcher: Dispatcher = LocalDispatcher()

    def forward(
        self, x: Tensor, mask: Tensor | None = None, context: TokenContext | None = None
    ) -> tuple[Tensor, RoutingRecord]:
        """Send each real token through its experts.

        Args:
            x: (N, L, D): rows of tokens, or (T, D).
            mask: bool (N, L) or (T,), True for real tokens; None means that all are real. Other
                tokens are not routed, count in no loss and get output 0. No real token at all is
                legal: the output is zero and every trainable parameter still gets a (zero)
                gradient.
            context: what the router may know of the rows besides their values.

        Returns:
            The output, shaped as `x`, and the record of the pass.
        """
        flat_TD = x.reshape(-1, x.shape[-1])
        real_T = None if mask is None else mask.reshape(-1).nonzero().squeeze(1)
        x_TD = flat_TD if real_T is None else flat_TD.index_select(0, real_T)
        routing = self._route(x_TD, (context or TokenContext()).at(x.shape[:-1], real_T))
        mixing = routing.mixing
        x_RD = x_TD if mixing is None else mixing.to_rows(x_TD)
        y_TD, tokens_E = self.dispatcher(x_RD, routing, self.experts)
        if mixing is not None:
            y_TD = mixing.to_tokens(y_TD)
        if self.companion is not None:
            y_TD = self.companion.join(x_TD, y_TD)
        if real_T is not None:
            y_TD = y_TD.new_zeros(flat_TD.shape).index_copy(0, real_T, y_TD)
        modality = None if context is None else context.modality
        routing = dataclasses.replace(routing, modality=modality)
        return y_TD.view(x.shape), self._record(routing, tokens_E)

    def _route(self, x_TD: Tensor, context: TokenContext) -> Routing:
        gather = self.dispatcher.gather_over_ranks
        wanted = self.router.wanted_noise() if self.training else None
        noise = None
        if wanted is not None:
            noise = wanted.of_batch(len(x_TD), device=x_TD.device, gather_over_ranks=gather)
        routing = self.router.agree(self.router(x_TD, context, noise), gather)
        if self.settings.drop_tokens:
            routing = within_capacity(
                routing,
                settings=self.settings,
                training=self.training,
                gather_over_ranks=gather,
            )
        return routing

    def _record(self, routing: Routing, tokens_E: Tensor) -> RoutingRecord:
        dropped = None
        if routing.keep_TK is not None:
            dropped = (routing.expert_TK < self.num_experts).sum() - tokens_E.sum()
        sums = RoutingSums.of(
            logit_TE=routing.logit_TE,
            prob_TE=routing.prob_TE,
            expert_TK=routing.expert_TK,
            dropped=dropped,
            entropy_gradient=self.settings.of_modality(routing.modality).local_entropy_coef > 0,
            sum_over_ranks=self.dispatcher.sum_over_ranks,
        )
        losses = self.router.losses(routing, sums, self.dispatcher.sum_over_ranks)
        return RoutingRecord(tokens_E, losses, sums.metrics(), sums.routed_E.round().long())


def _companion(
    width: int, hidden: int, settings: MoESettings, activation: str
) -> Residual | SharedExpert | None:
    if settings.use_residual:
        return Residual(width=width, hidden=hidden, activation=activation)
    if settings.num_shared_experts:
        hidden = hidden * settings.num_shared_experts
        return SharedExpert(width=width, hidden=hidden, activation=activation)
    return None


def moe_layers(model: nn.Module) -> dict[str, MoELayer]:
    """The sparse layers of a model by their full names, in the order of the model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MoELayer)}


def couples_samples(model: nn.Module) -> bool:
    """Whether a sample's output depends on the other samples of its batch, outside training.

    So it does where experts have a capacity or choose their tokens. A model without either says the
    same of a sample whatever it is batched with, up to rounding.
    """
    layers = moe_layers(model).values()
    return any(layer.settings.drop_tokens or layer.router.couples_samples for layer in layers)
