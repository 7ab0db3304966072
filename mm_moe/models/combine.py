"""Several members' predictions as one: product, mixture, mean.

Axes: B samples, K members, M modalities, C outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_moe.errors import ConfigError
from mm_moe.registry import nearest

PRODUCT, MIXTURE, MEAN = "product", "mixture", "mean"
COMBINES = (PRODUCT, MIXTURE, MEAN)


def check_combine(combine: str, problem_type: str | None) -> str:
    """Return the rule's name.

    Raises:
        ConfigError: an unknown rule, or a product of numbers that are no probabilities.
    """
    if combine not in COMBINES:
        raise ConfigError(f"unknown combine {combine!r}; {nearest(combine, list(COMBINES))}")
    if combine == PRODUCT and problem_type == "regression":
        raise ConfigError(
            "combine 'product' multiplies probabilities, and a regression has none; take mean or "
            "mixture."
        )
    return combine


def members_in_use(present_BM: Tensor, members: Sequence[Sequence[int]]) -> Tensor:
    """Which members speak for a sample, bool (B, K).

    Those all of whose modalities are present. Where none is: those with the most present
    modalities, and among these those over the most modalities; so that with nothing present the
    joint member decides alone, by its constants. Never empty.

    I2M2 knows complete samples only; dropping the factors of absent modalities is ours.

    Args:
        present_BM: of the samples.
        members: for each member the indices of its modalities.
    """
    there_BK = torch.stack([present_BM[:, list(each)].sum(1) for each in members], dim=1)
    size_K = there_BK.new_tensor([len(each) for each in members])
    complete_BK = there_BK == size_K
    rank_BK = there_BK * (size_K.max() + 1) + size_K
    best_BK = rank_BK == rank_BK.amax(1, keepdim=True)
    return torch.where(complete_BK.any(1, keepdim=True), complete_BK, best_BK)


def product_of_experts(logits_BKC: Tensor, use_BK: Tensor) -> Tensor:
    """Logits (B, C) of the normalised product of the members in use: the sum of their logits.

    log_softmax only takes a constant from every sample's logits, so that this is the sum of
    log-probabilities, normalised again (I2M2, Madaan et al. 2024). Of independent labels it is the
    product of each label's two probabilities.
    """
    return torch.where(use_BK[..., None], logits_BKC, 0.0).sum(1)


def mixture_of_experts(
    logits_BKC: Tensor, use_BK: Tensor, gate_BK: Tensor, problem_type: str | None
) -> Tensor:
    """Logits (B, C) of the weighted mean of the probabilities (or values) of the members in use.

    Args:
        logits_BKC: of the members.
        use_BK: who is in use.
        gate_BK: logits of the weights; zeros are the plain mean.
        problem_type: see `mm_moe.data.schema`.
    """
    weight_BK = gate_BK.float().masked_fill(~use_BK, float("-inf")).log_softmax(1)
    weight_BK1, z_BKC = weight_BK[..., None], logits_BKC.float()
    if problem_type == "regression":
        return (weight_BK1.exp() * z_BKC).sum(1)
    if problem_type == "multi_label_classification":
        yes_BC = (weight_BK1 + F.logsigmoid(z_BKC)).logsumexp(1)
        no_BC = (weight_BK1 + F.logsigmoid(-z_BKC)).logsumexp(1)
        return yes_BC - no_BC
    return (weight_BK1 + z_BKC.log_softmax(-1)).logsumexp(1)
