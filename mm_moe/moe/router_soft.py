"""Soft routing: experts work on mixtures of a sequence's tokens.

T real tokens of this rank, D width, N sequences with a token, L tokens of the longest sequence,
E experts, P slots per expert, S = E * P slots of a sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mm_moe.errors import ConfigError
from mm_moe.moe.balance import RoutingSums, SumOverRanks
from mm_moe.moe.context import TokenContext
from mm_moe.moe.router import Router, Routing
from mm_moe.moe.settings import MoESettings


@dataclass(frozen=True)
class SlotMixing:
    """Slots as weighted means of a sequence's tokens, and tokens as weighted means of its slots.

    Attributes:
        flat_T: place of each token in (N, L).
        dispatch_NLS: what a slot takes of each token; sums to 1 over L, 0 where no token is.
        combine_NLS: what a token takes of each slot; sums to 1 over S.
    """

    flat_T: Tensor
    dispatch_NLS: Tensor
    combine_NLS: Tensor

    def to_rows(self, x_TD: Tensor) -> Tensor:
        """Slots (N * S, D), sequence by sequence."""
        x_NLD = _padded(x_TD, self.flat_T, self.dispatch_NLS.shape[:2], 0.0)
        slot_NSD = torch.bmm(self.dispatch_NLS.to(x_TD.dtype).transpose(1, 2), x_NLD)
        return slot_NSD.flatten(0, 1)

    def to_tokens(self, y_RD: Tensor) -> Tensor:
        """Outputs (T, D) of the real tokens."""
        num_sequences, _, num_slots = self.combine_NLS.shape
        y_NSD = y_RD.view(num_sequences, num_slots, y_RD.shape[-1])
        y_NLD = torch.bmm(self.combine_NLS.to(y_RD.dtype), y_NSD)
        return y_NLD.flatten(0, 1).index_select(0, self.flat_T)


def _padded(value_TX: Tensor, flat_T: Tensor, shape: torch.Size, fill: float) -> Tensor:
    """Tokens in their places (N, L, X), `fill` elsewhere."""
    empty = value_TX.new_full((shape.numel(), value_TX.shape[-1]), fill)
    return empty.index_copy(0, flat_T, value_TX).view(*shape, value_TX.shape[-1])


class SoftSlotsRouter(Router):
    """P slots per expert and sequence: each slot is a mixture of the sequence's real tokens.

    Scores are scale * <token, key> of vectors of length 1, one key per slot. A slot's input is the
    mean of the tokens by softmax over the sequence; a token's output is the mean of the slots'
    outputs by softmax over the slots. Nothing is chosen, so nothing is dropped or unbalanced, and
    there is no balance loss; `top_k` plays no part. Experts are not given tokens, so an upcycled
    layer does not start as the dense one, and inside a causal tower a token sees later ones.

    Source: Soft MoE (Puigcerver et al. 2023), with the normalisation of its section 2.3. Padding
    has no part in the softmax; a sequence without a real token has no slots; both are ours.
    """

    takes_capacity = False
    keeps_dense_function = False

    def __init__(self, *, width: int, settings: MoESettings) -> None:
        num_slots = settings.num_experts * settings.slots_per_expert
        super().__init__(width=width, settings=settings, num_scores=num_slots)
        # one element, not a scalar: DeepSpeed cannot broadcast tensors without dimensions
        self.scale = nn.Parameter(torch.ones(1))

    def score(self, x_TD: Tensor) -> Tensor:
        """Logits (T, S) in float32 (float64 stays), also under autocast or with bf16 weights."""
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            key_SD = F.normalize(self.weight.to(dtype), dim=-1) * self.scale.to(dtype)
            return F.linear(F.normalize(x_TD.to(dtype), dim=-1), key_SD)

    def forward(
        self, x_TD: Tensor, context: TokenContext | None = None, noise: Tensor | None = None
    ) -> Routing:
        """Mix each sequence's tokens by themselves.

        Raises:
            ConfigError: the layer was not given sequences (N, L, D).
        """
        if context is None or context.shape is None or len(context.shape) != 2:
            raise ConfigError(
                f"router {self.settings.router!r} mixes the tokens of a sequence and needs input "
                f"(N, L, D), got (T, D) = {tuple(x_TD.shape)}; keep the sequences apart, or take "
                "another router, such as topk_softmax."
            )
        flat_T, shape = _places(context, x_TD.device)
        logit_TS = self.score(x_TD)
        dispatch_NLS = _padded(logit_TS, flat_T, shape, -torch.inf).softmax(1)
        combine_TS = logit_TS.softmax(-1)
        slots = SlotMixing(flat_T, dispatch_NLS, _padded(combine_TS, flat_T, shape, 0.0))
        settings = self.settings
        expert_S = torch.arange(settings.num_experts, device=x_TD.device)
        expert_S = expert_S.repeat_interleave(settings.slots_per_expert)
        expert_R1 = expert_S.repeat(shape[0]).unsqueeze(1)
        of_expert = (len(x_TD), settings.num_experts, settings.slots_per_expert)
        return Routing(
            logit_TE=logit_TS.view(of_expert).logsumexp(-1),
            prob_TE=combine_TS.view(of_expert).sum(-1),
            expert_TK=expert_R1,
            weight_TK=logit_TS.new_ones(expert_R1.shape),
            mixing=slots,
        )

    def losses(
        self, routing: Routing, sums: RoutingSums, sum_over_ranks: SumOverRanks
    ) -> dict[str, Tensor]:
        """The shared losses; the load is even by design."""
        return self.shared_losses(sums, routing.modality)


def _places(context: TokenContext, device: torch.device) -> tuple[Tensor, torch.Size]:
    """Place (T,) of each token in (N, L), counting only sequences that have a token."""
    assert context.shape is not None  # checked by the caller
    row_T, place_T = context.rows_and_places(device)
    with_token_N, row_T = row_T.unique(return_inverse=True)
    length = context.shape[1]
    return row_T * length + place_T, torch.Size([len(with_token_N), length])
