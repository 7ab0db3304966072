"""How the counts of a cell are spread around what a decoder says.

N cells, G genes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


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
