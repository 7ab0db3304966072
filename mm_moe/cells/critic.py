"""Critics of outputs: they tell real cells of a species from generated ones.

N cells, G genes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

LOSSES = ("logits", "hinge")


class OutputCritic(nn.Module):
    """Log-normalised values of one species (N, G) to one number (N,): larger is more real.

    Args:
        num_genes: G.
        hidden: widths of the hidden layers.
        spectral: keep the largest singular value of each layer at 1 (Miyato et al. 2018).
    """

    def __init__(self, num_genes: int, *, hidden: Sequence[int], spectral: bool = True) -> None:
        super().__init__()
        widths = [num_genes, *hidden, 1]
        linears = [nn.Linear(before, behind) for before, behind in itertools.pairwise(widths)]
        self.linears = nn.ModuleList(
            spectral_norm(linear) if spectral else linear for linear in linears
        )

    def forward(self, x: Tensor) -> Tensor:
        """How real each cell looks."""
        for linear in self.linears[:-1]:
            x = F.leaky_relu(linear(x), 0.2)
        return self.linears[-1](x).squeeze(-1)


def critic_loss(real: Tensor, generated: Tensor, *, kind: str) -> tuple[Tensor, Tensor]:
    """What a critic minimises, as (of real cells, of generated cells), each cell apart (N,).

    "logits" is the cross-entropy of real against generated, "hinge" the hinge loss.
    """
    if kind == "hinge":
        return (1 - real).relu(), (1 + generated).relu()
    return F.softplus(-real), F.softplus(generated)


def fooling_loss(generated: Tensor, *, kind: str) -> Tensor:
    """What a generator minimises (N,): generated cells shall look real; it does not saturate."""
    return -generated if kind == "hinge" else F.softplus(-generated)


def roc_auc(real: Tensor, generated: Tensor) -> float:
    """Share of (real, generated) pairs in the right order, ties count half; .5 without a pair.

    The area under the ROC curve, by the rank sum.
    """
    if not len(real) or not len(generated):
        return 0.5
    order = torch.sort(generated.float()).values
    below = torch.searchsorted(order, real.float().contiguous(), side="left")
    up_to = torch.searchsorted(order, real.float().contiguous(), side="right")
    return float((below + up_to).double().mean() / 2 / len(generated))
