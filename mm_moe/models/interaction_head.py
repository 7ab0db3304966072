"""Interaction experts: one sparse head whose experts stand for kinds of interaction.

A fuser weighs the experts of redundancy, of each modality's uniqueness and of synergy, and all of
them answer in one dispatch: the fused feature of a sample is copied once per kind, and the router
`by_interaction` sends copy k to kind k's experts, wherever they live.

B samples, D width of the fused feature, K kinds of interaction, C outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_moe.models.fusion import HEAD_STD, FusionSettings, LowRankFusion
from mm_moe.models.interaction_settings import InteractionSettings
from mm_moe.moe.context import TokenContext
from mm_moe.moe.layer import MoELayer, RoutingRecord
from mm_moe.moe.settings import MoESettings

LAYER_NAME = "interaction.0"  # of the head's record among those of the towers


@dataclass
class InteractionOutput:
    """What the interaction experts say.

    Attributes:
        mixed_BC: logits whose softmax (or sigmoid) is the mixture, or the mixed value.
        log_weight_BK: logarithm of the fuser's weights.
        logits_BKC: each kind's own logits; None where hard routing computed one kind per sample.
        record: of the sparse layer.
    """

    mixed_BC: Tensor
    log_weight_BK: Tensor
    logits_BKC: Tensor | None
    record: RoutingRecord

    @property
    def losses(self) -> dict[str, Tensor]:
        """The layer's own losses, where a gate chooses among several experts of a kind."""
        return {f"kinds_{name}": loss for name, loss in self.record.losses.items()}


class InteractionHead(nn.Module):
    """p(y | x) = sum over kinds k of w_k(x) p_k(y | x), by experts that may be spread over ranks.

    Source: Mixtures of Multimodal Interaction Experts (Yu et al. 2024), where each expert and the
    fuser is a fine-tuned copy of the whole model. Here they share the towers: an expert is a
    feed-forward on the fused feature, all of them are one `MoELayer`, and one pass gives every
    expert's answer. The last projection to classes is shared, too; that limits nothing while there
    are fewer classes than D, as each expert's own output matrix stands before it.

    Args:
        widths: of the features of each modality.
        num_outputs: C.
        modalities: name the kinds.
        problem_type: what an expert's C values are: logits of classes, of independent labels, or
            the value of a regression.
        settings: shape of the experts and the fuser.
        fusion: how features become one; a hidden layer of the head has no place here.
    """

    def __init__(
        self,
        widths: Sequence[int],
        num_outputs: int,
        *,
        modalities: Sequence[str],
        problem_type: str | None,
        settings: InteractionSettings,
        fusion: FusionSettings,
    ) -> None:
        super().__init__()
        self.kinds = settings.names(modalities, num_labels=num_outputs)
        self.problem_type, self.hard = problem_type, settings.hard
        num_kinds, width = len(self.kinds), sum(widths)
        self.low_rank: LowRankFusion | None = None
        if fusion.fusion == "low_rank":
            width = fusion.size
            self.low_rank = LowRankFusion(widths, rank=fusion.rank, size=fusion.size)
        sparse = MoESettings(
            num_experts=num_kinds * settings.experts_per_kind,
            router="by_interaction",
            num_interactions=num_kinds,
        )
        # no "expert" in names outside the layer: DeepSpeed would take the weight for an expert's
        self.layer = MoELayer(width=width, hidden=settings.hidden, settings=sparse)
        self.classify = nn.Linear(width, num_outputs)
        self.fuser_in = nn.Linear(width, settings.fuser_hidden)
        self.fuser_out = nn.Linear(settings.fuser_hidden, num_kinds)
        self.draw()

    def draw(self) -> None:
        """New weights; at the start all kinds weigh about the same."""
        if self.classify.weight.is_meta:
            return
        experts, first, last = self.layer.experts, self.fuser_in, self.fuser_out
        nn.init.normal_(experts.w_in, std=experts.w_in.shape[1] ** -0.5)
        nn.init.normal_(experts.w_out, std=experts.w_out.shape[1] ** -0.5)
        nn.init.normal_(first.weight, std=first.in_features**-0.5)
        nn.init.normal_(last.weight, std=HEAD_STD)
        nn.init.normal_(self.classify.weight, std=HEAD_STD)
        for bias in (experts.b_in, experts.b_out, first.bias, last.bias, self.classify.bias):
            nn.init.zeros_(bias)
        self.layer.router.reset_parameters()
        if self.low_rank is not None:
            self.low_rank.reset_parameters()

    def forward(self, parts: Sequence[Tensor]) -> InteractionOutput:
        """Mix the experts' answers to one feature (B, width) per modality."""
        x_BD = self.low_rank(parts) if self.low_rank is not None else torch.cat([*parts], -1)
        score_BK = self.fuser_out(F.gelu(self.fuser_in(x_BD)))
        dtype = torch.promote_types(score_BK.dtype, torch.float32)
        log_weight_BK = score_BK.to(dtype).log_softmax(-1)
        if self.hard and not self.training:
            kind_B = log_weight_BK.argmax(-1)
            y_BD, record = self._through_experts(x_BD, kind_B)
            logits_B1C = self.classify(y_BD).to(dtype).unsqueeze(1)
            alone_B1 = torch.zeros_like(log_weight_BK[:, :1])
            mixed_BC = mix(logits_B1C, alone_B1, problem_type=self.problem_type)
            return InteractionOutput(mixed_BC, log_weight_BK, None, record)
        num_kinds = len(self.kinds)
        kind_T = torch.arange(num_kinds, device=x_BD.device).repeat(len(x_BD))
        y_TD, record = self._through_experts(x_BD.repeat_interleave(num_kinds, 0), kind_T)
        logits_TC = self.classify(y_TD).to(dtype)
        logits_BKC = logits_TC.view(len(x_BD), num_kinds, logits_TC.shape[-1])
        mixed_BC = mix(logits_BKC, log_weight_BK, problem_type=self.problem_type)
        return InteractionOutput(mixed_BC, log_weight_BK, logits_BKC, record)

    def _through_experts(self, x_TD: Tensor, kind_T: Tensor) -> tuple[Tensor, RoutingRecord]:
        """Each row through its kind's experts.

        The record has no number of tokens: samples without any modality are among the rows, and
        what a run counts as tokens are those of the towers.
        """
        y_TD, record = self.layer(x_TD, context=TokenContext(interaction=kind_T))
        metrics = {name: value for name, value in record.metrics.items() if name != "tokens"}
        return y_TD, dataclasses.replace(record, metrics=metrics)


def mix(logits_BKC: Tensor, log_weight_BK: Tensor, *, problem_type: str | None) -> Tensor:
    """The mixture's logits (B, C): log sum_k w_k p_k(y), without leaving the logarithms.

    Classes: log-probabilities. Independent labels: the log-odds of each label's mixed probability.
    Regression: the weighted mean.
    """
    log_weight_BK1 = log_weight_BK.unsqueeze(-1)
    if problem_type == "regression":
        return (log_weight_BK1.exp() * logits_BKC).sum(1)
    if problem_type == "multi_label_classification":
        yes_BC = (log_weight_BK1 + F.logsigmoid(logits_BKC)).logsumexp(1)
        return yes_BC - (log_weight_BK1 + F.logsigmoid(-logits_BKC)).logsumexp(1)
    return (log_weight_BK1 + logits_BKC.log_softmax(-1)).logsumexp(1)
