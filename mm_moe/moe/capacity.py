"""Capacity: how many rows an expert may take, agreed between ranks, the least sure rows dropped.

Capacity comes from the number of tokens of all ranks, and rows compete over all ranks, so the
result is the same for every split of the batch. (A capacity from local counts differs between ranks
as soon as one lacks a modality.)

T tokens, E experts, K choices per token, R choices of all ranks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from mm_moe.moe.router import Routing
from mm_moe.moe.settings import MoESettings

GatherOverRanks = Callable[[Tensor], tuple[Tensor, int]]


def expert_capacity(*, num_choices: int, settings: MoESettings, training: bool) -> int:
    """Rows that one expert takes of `num_choices` (tokens of all ranks times top_k)."""
    factor = settings.capacity_factor if training else settings.eval_capacity_factor
    return max(settings.min_capacity, math.ceil(num_choices * factor / settings.num_experts))


def within_capacity(
    routing: Routing, *, settings: MoESettings, training: bool, gather_over_ranks: GatherOverRanks
) -> Routing:
    """Mark the choices that an expert has no room for.

    Each expert keeps its most probable rows over all ranks; of equal ones, the first in the batch.
    A token whose choices are all dropped gets output 0 (the residual connection around the layer
    carries it). Weights are not renormalised over what remains.

    Source: batch-prioritised routing of V-MoE (Riquelme et al. 2021), which ranks tokens by their
    best probability; we rank each row by its own.
    """
    chosen_TK = routing.prob_TE.detach().gather(-1, routing.expert_TK)
    mine_R2 = torch.stack([routing.expert_TK.to(chosen_TK.dtype), chosen_TK], -1).view(-1, 2)
    all_R2, start = gather_over_ranks(mine_R2)
    keep_R = first_of_each(
        all_R2[:, 0].long(),
        all_R2[:, 1],
        expert_capacity(num_choices=len(all_R2), settings=settings, training=training),
        num_experts=settings.num_experts,
    )
    keep_TK = keep_R[start : start + len(mine_R2)].view_as(routing.expert_TK)
    return dataclasses.replace(routing, keep_TK=keep_TK)


def first_of_each(
    expert_R: Tensor, priority_R: Tensor, capacity: int, *, num_experts: int
) -> Tensor:
    """Bool (R,): whether a row is among the `capacity` rows of highest priority of its expert."""
    order_R = priority_R.argsort(descending=True, stable=True)
    order_R = order_R[expert_R[order_R].argsort(stable=True)]
    rows_E = torch.bincount(expert_R, minlength=num_experts)
    start_E = rows_E.cumsum(0) - rows_E
    rank_R = torch.arange(len(expert_R), device=expert_R.device) - start_E[expert_R[order_R]]
    return torch.zeros_like(expert_R, dtype=torch.bool).index_copy_(0, order_R, rank_R < capacity)
