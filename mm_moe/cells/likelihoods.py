"""How the counts of a cell are spread around what a decoder says.

N cells, G genes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mm_moe.cells.counts import GeneRows


def squared_error(mean: Tensor, target: Tensor) -> Tensor:
    """Sum over genes (N,) of squared differences: a normal likelihood of variance 1/2."""
    return (mean - target).square().sum(-1)


def nb_log_prob(counts: Tensor, log_mean: Tensor, log_theta: Tensor) -> Tensor:
    """Log-probability (N, G) of counts under negative binomials.

    Args:
        counts: (N, G).
        log_mean: logarithm of the mean (N, G).
        log_theta: logarithm of the inverse dispersion, (G,) or (N, G): variance is
            mean + mean^2 / theta.
    """
    theta = log_theta.exp()
    log_sum = torch.logaddexp(log_theta, log_mean)
    chosen = torch.lgamma(counts + theta) - torch.lgamma(theta) - torch.lgamma(counts + 1)
    return chosen + theta * (log_theta - log_sum) + counts * (log_mean - log_sum)


def nb_loss(rows: GeneRows, log_share: Tensor, log_theta: Tensor) -> Tensor:
    """Negative log-likelihood (N,) of cells under negative binomials, the sum over genes.

    `nb_log_prob` given the sum of each cell, but most counts are 0, and there every term but
    theta log(1 + mean / theta) vanishes: the gamma functions see the other counts alone.

    Args:
        rows: the cells.
        log_share: logarithm of each gene's share of the mean counts (N, G).
        log_theta: logarithm of the inverse dispersion (G,).
    """
    log_sum_N = rows.sum_N.clamp(min=1).log()
    ratio = (log_share - log_theta).add_(log_sum_N.unsqueeze(1))  # log of mean / theta
    theta = log_theta.exp()
    silent_N = F.softplus(ratio) @ theta
    counts, theta_T = rows.rows.val, theta[rows.rows.col]
    chosen = torch.lgamma(counts + theta_T) - torch.lgamma(theta_T) - torch.lgamma(counts + 1)
    spoken_T = chosen + counts * F.logsigmoid(ratio.flatten()[rows.place_T])
    return silent_N.index_add(0, rows.row_T, spoken_T, alpha=-1)


def zinb_log_prob(
    counts: Tensor, log_mean: Tensor, log_theta: Tensor, zero_logits: Tensor
) -> Tensor:
    """Log-probability (N, G) under a mixture of zero and a negative binomial.

    Args:
        counts: (N, G).
        log_mean: of the negative binomial.
        log_theta: likewise.
        zero_logits: logits of the share of the zero (N, G).
    """
    seen = F.logsigmoid(-zero_logits) + nb_log_prob(counts, log_mean, log_theta)
    return torch.where(counts == 0, torch.logaddexp(F.logsigmoid(zero_logits), seen), seen)
