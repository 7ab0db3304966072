"""Retrieval of missing tokens by sparse experts (MoE-Retriever).

Axes: B samples, M modalities, P tokens of a modality, H width, Q missing cells, N supports of a
cell, C = N + M contexts of a cell (its supports, then the sample's own modalities).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_moe.errors import ConfigError
from mm_moe.fill.attention import MaskedAttention
from mm_moe.fill.base import Cells, Fill, FillShape, flag, number, support_table, whole
from mm_moe.fill.simple import TOKEN_STD, DefaultTokens
from mm_moe.moe.context import TokenContext
from mm_moe.moe.layer import MoELayer, RoutingRecord
from mm_moe.moe.settings import MoESettings

LAYER_NAME = "fill.0"  # of the routing record
ROUTER = "noisy_candidates"
NUM_CANDIDATES, NUM_SHARED, TOP_K, GATE_LOSS_COEF = 8, 4, 4, 1e-2  # as published
# Factors of what is retrieved at the start: about as large as a default token; far below one.
AROUND_DEFAULT, AROUND_ZERO = 0.02, 0.001


class RetrieverFill(Fill):
    """Missing tokens from other subjects' tokens of the modality and the sample's own others.

    The n supports and the observed modalities of a cell are one sequence. It goes through attention
    (pre-norm, residual) and a sparse layer whose router may only choose experts of the missing
    modality and shared ones. What is put in place is (1 - beta) times the mean of the experts'
    outputs over the supports plus beta times that over the observed modalities, token by token. A
    cell whose sample has nothing is filled from the supports alone; one without supports gets
    learned default tokens.

    Source: MoE-Retriever, as its figure draws it. The released code attends within each subject
    alone, drops the block's input and pools the *inputs*, so no weight of it learns; `legacy` does
    the last of these (a fixed weighted mean of encodings, and no parts to train). Its gate loss is
    a part of the objective here.

    Args:
        shape: of the model's tokens.
        num_candidates: experts of each modality.
        num_candidates_shared: experts for all of them.
        top_k: experts that a token visits.
        num_supports: n; None: as many as the sample has modalities (the data draw them).
        num_heads: of the attention.
        beta: weight of the sample's own modalities.
        dropout: of the attention weights and of what attention adds.
        gate_loss_coef: weight of the router's balance losses.
        residual: add the pooled input of the sparse layer, so that experts correct a mean.
        segments: add a learned vector to each token for its modality, and one to those of supports.
        legacy: the released behaviour.
        around_default: what is retrieved is added to learned default tokens, each channel times a
            learned factor of the modality that starts near 0. A retrieved token looks like a real
            one, and does not tell the fusion that the modality is missing; these do. Ours.
        around_zero: what is retrieved is put in times such factors, and no default token is added:
            training starts with zero fill, and retrieval grows where it helps. Ours.
        num_draws: times that scoring draws supports for a sample that lacks something; the model's
            logits are averaged over them (multiple imputation). Training draws once a step.
        temperature: of `similar_retriever` alone, which weighs supports; None: its default.
        warm_up_steps: see `Fill`.

    Raises:
        ConfigError: an option that cannot work.
    """

    needs_supports: ClassVar[bool] = True
    own_temperature: ClassVar[float | None] = None  # supports weigh all the same

    def __init__(
        self,
        shape: FillShape,
        *,
        num_candidates: int = NUM_CANDIDATES,
        num_candidates_shared: int = NUM_SHARED,
        top_k: int = TOP_K,
        num_supports: int | None = None,
        num_heads: int = 4,
        beta: float = 0.5,
        dropout: float = 0.1,
        gate_loss_coef: float = GATE_LOSS_COEF,
        residual: bool = False,
        segments: bool = False,
        around_default: bool = False,
        around_zero: bool = False,
        legacy: bool = False,
        num_draws: int = 1,
        temperature: float | None = None,
        warm_up_steps: int = 0,
    ) -> None:
        super().__init__(shape, warm_up_steps=warm_up_steps)
        self.beta = number("beta", beta, most=1.0)
        self.dropout = number("dropout", dropout, most=1.0)
        self.residual, self.legacy = flag("residual", residual), flag("legacy", legacy)
        if num_supports is not None:
            whole("num_supports", num_supports, least=1)
        self.num_supports = num_supports
        self.num_draws = whole("num_draws", num_draws, least=1)
        self.temperature = self._checked_temperature(temperature)
        self.default = DefaultTokens(shape)
        width = shape.width
        start = self._gate_start(around_default=around_default, around_zero=around_zero)
        self.around_default = around_default
        self.gate: nn.Parameter | None = None
        if start is not None:
            self.gate = nn.Parameter(torch.full((len(shape.modalities), width), start))
        if width % whole("num_heads", num_heads, least=1):
            raise ConfigError(
                f"fill_config.num_heads ({num_heads}) must divide the tokens' width ({width})."
            )
        settings = candidate_settings(
            len(shape.modalities),
            num_candidates=num_candidates,
            num_candidates_shared=num_candidates_shared,
            top_k=top_k,
            gate_loss_coef=gate_loss_coef,
        )
        if self.legacy:
            return
        self.segments: nn.Parameter | None = None
        if flag("segments", segments):
            self.segments = nn.Parameter(TOKEN_STD * torch.randn(len(shape.modalities) + 1, width))
        self.norm_in, self.norm_out = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = MaskedAttention(width, num_heads=num_heads, dropout=self.dropout)
        self.layer = MoELayer(width=width, hidden=2 * width, settings=settings)

    def _gate_start(self, *, around_default: bool, around_zero: bool) -> float | None:
        """What the factors of retrieved channels start at; None: there are none."""
        asked = flag("around_default", around_default), flag("around_zero", around_zero)
        if not any(asked):
            return None
        if self.legacy or all(asked):
            raise ConfigError(
                "fill_config: around_default and around_zero exclude each other, and legacy, the "
                "released behaviour, knows neither; keep one of the three."
            )
        return AROUND_DEFAULT if around_default else AROUND_ZERO

    def _checked_temperature(self, temperature: float | None) -> float | None:
        if temperature is None:
            return self.own_temperature
        number("temperature", temperature)
        if self.own_temperature is None or not temperature:
            raise ConfigError(
                f"fill_config.temperature ({temperature}) is for fill 'similar_retriever', above "
                "0; leave it out, or take that fill."
            )
        return temperature

    @classmethod
    def count_experts(cls, num_modalities: int, options: Mapping[str, Any]) -> int:
        """M * `num_candidates` + `num_candidates_shared`; 0 with `legacy`."""
        names = ("num_candidates", "num_candidates_shared", "top_k", "gate_loss_coef")
        given = {name: options[name] for name in names if name in options}
        settings = candidate_settings(num_modalities, **given)
        return 0 if options.get("legacy") else settings.num_experts

    def sparse_layers(self) -> dict[str, MoELayer]:
        """The one sparse layer; none with `legacy`."""
        return {} if self.legacy else {LAYER_NAME: self.layer}

    def make(self, cells: Cells) -> tuple[Tensor, dict[str, RoutingRecord]]:
        """Retrieve the tokens of all cells at once."""
        if not len(cells.sample_Q):
            return self._of_none(cells)
        table_SPH, place_QN, _ = support_table(cells, self.shape.modalities)
        has_QN = place_QN < len(table_SPH) - 1
        own_QMPH = cells.tokens_BMPH.index_select(0, cells.sample_Q)
        x_QCPH = torch.cat([table_SPH[place_QN], own_QMPH], 1)
        own_QM = cells.present_BM.index_select(0, cells.sample_Q)
        score_QN = self.scores(cells, place_QN)
        weight_QC = pool_weights(has_QN, own_QM, beta=self.beta, score_QN=score_QN)
        found_Q1 = has_QN.any(1, keepdim=True)
        keep_QC = torch.cat([has_QN, own_QM], 1) & found_Q1  # a default token asks no expert
        y_QCPH, records = self._attend(x_QCPH, keep_QC, cells.modality_Q)
        pooled_QPH = torch.einsum("qc,qcph->qph", weight_QC.to(y_QCPH.dtype), y_QCPH)
        default_QPH = self.default(cells.modality_Q)
        if self.gate is not None:
            pooled_QPH = self.gate[cells.modality_Q][:, None] * pooled_QPH
        if self.around_default:
            pooled_QPH = default_QPH + pooled_QPH
        return torch.where(found_Q1[:, None], pooled_QPH, default_QPH), records

    def scores(self, cells: Cells, place_QN: Tensor) -> Tensor | None:
        """What a cell's supports weigh (Q, N), before a softmax over them; None: all the same."""
        return None

    def _of_none(self, cells: Cells) -> tuple[Tensor, dict[str, RoutingRecord]]:
        """No cell: a blank row without a real token keeps every part in the graph."""
        x_BMPH = cells.tokens_BMPH
        blank_1CPH = x_BMPH.new_zeros(1, x_BMPH.shape[1] + 1, *x_BMPH.shape[2:])
        target_1 = torch.zeros(1, dtype=torch.int64, device=x_BMPH.device)
        nothing_1C = torch.zeros(blank_1CPH.shape[:2], dtype=torch.bool, device=x_BMPH.device)
        y_1CPH, records = self._attend(blank_1CPH, nothing_1C, target_1)
        y_1PH = y_1CPH.sum(1)
        if self.gate is not None:
            y_1PH = self.gate[target_1][:, None] * y_1PH
        return (y_1PH + self.default(target_1))[:0], records

    def _attend(
        self, x_QCPH: Tensor, keep_QC: Tensor, target_Q: Tensor
    ) -> tuple[Tensor, dict[str, RoutingRecord]]:
        """What is pooled, shaped as `x_QCPH`: the experts' outputs."""
        if self.legacy:
            return x_QCPH, {}
        if self.segments is not None:
            x_QCPH = x_QCPH + self._marks(x_QCPH.shape[1], target_Q)[:, :, None]
        s_QTH = x_QCPH.flatten(1, 2)
        keep_QT = keep_QC.repeat_interleave(x_QCPH.shape[2], 1)
        added_QTH = self.attention(self.norm_in(s_QTH), keep_QT)
        z_QTH = s_QTH + F.dropout(added_QTH, self.dropout, self.training)
        context = TokenContext(target=target_Q)
        y_QTH, record = self.layer(self.norm_out(z_QTH), keep_QT, context)
        if self.residual:
            y_QTH = y_QTH + z_QTH
        return y_QTH.view(x_QCPH.shape), {LAYER_NAME: record}

    def _marks(self, num_contexts: int, target_Q: Tensor) -> Tensor:
        """Vectors (Q, C, H) that say what the contexts are."""
        assert self.segments is not None  # asked for
        num_modalities = len(self.shape.modalities)
        support_Q1H = (self.segments[target_Q] + self.segments[-1])[:, None]
        own_1MH = self.segments[None, :-1]
        support_QNH = support_Q1H.expand(-1, num_contexts - num_modalities, -1)
        return torch.cat([support_QNH, own_1MH.expand(len(target_Q), -1, -1)], 1)


def pool_weights(
    has_QN: Tensor, own_QM: Tensor, *, beta: float, score_QN: Tensor | None = None
) -> Tensor:
    """Weights (Q, N + M) of a cell's contexts, which sum to 1: beta belongs to the sample's own.

    With contexts of one kind alone, they have all of it; without any the weights are 0.

    Args:
        has_QN: which supports there are.
        own_QM: which modalities the sample has.
        beta: share of these.
        score_QN: of the supports, which share the rest by their softmax; None: evenly.
    """
    count_Q1, own_Q1 = has_QN.sum(1, keepdim=True), own_QM.sum(1, keepdim=True)
    share_Q1 = torch.full(count_Q1.shape, 1 - beta, dtype=torch.float64, device=has_QN.device)
    share_Q1 = share_Q1.masked_fill(own_Q1 == 0, 1.0).masked_fill(count_Q1 == 0, 0.0)
    rest_Q1 = 1 - share_Q1
    if score_QN is None:
        score_QN = torch.zeros_like(share_Q1).expand_as(has_QN)
    lowest = torch.finfo(torch.float64).min
    part_QN = score_QN.double().masked_fill(~has_QN, lowest).softmax(-1)
    support_QN = has_QN * share_Q1 * part_QN
    return torch.cat([support_QN, own_QM * rest_Q1 / own_Q1.clamp(min=1)], 1)


def candidate_settings(
    num_modalities: int,
    *,
    num_candidates: int = NUM_CANDIDATES,
    num_candidates_shared: int = NUM_SHARED,
    top_k: int = TOP_K,
    gate_loss_coef: float = GATE_LOSS_COEF,
) -> MoESettings:
    """Settings of the sparse layer: M * `num_candidates` + `num_candidates_shared` experts.

    Raises:
        ConfigError: a number that cannot work.
    """
    own = whole("num_candidates", num_candidates, least=1)
    shared = whole("num_candidates_shared", num_candidates_shared, least=0)
    if whole("top_k", top_k, least=1) > own + shared:
        raise ConfigError(
            f"fill_config.top_k ({top_k}) is more than the {own + shared} experts that a token may "
            f"visit (num_candidates {own} + num_candidates_shared {shared}); try top_k="
            f"{own + shared}."
        )
    return MoESettings(
        num_experts=num_modalities * own + shared,
        top_k=top_k,
        router=ROUTER,
        load_balance_coef=number("gate_loss_coef", gate_loss_coef),
        router_z_coef=0.0,
        num_modalities=num_modalities,
        num_shared_candidates=shared,
    )
