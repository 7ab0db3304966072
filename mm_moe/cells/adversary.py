"""Classifiers that try to read from a hidden layer what it should not know.

N cells, W width of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from mm_moe.batch import IGNORED_LABEL


class _Reverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return -ctx.weight * grad, None


def reverse_gradient(x: Tensor, weight: float = 1.0) -> Tensor:
    """The values themselves; their gradient is multiplied by -weight (Ganin et al. 2016)."""
    reversed_: Tensor = _Reverse.apply(x, weight)  # type: ignore[no-untyped-call]
    return reversed_


class Adversary(nn.Module):
    """One trunk and a linear classifier per column, on one layer.

    Args:
        width: W.
        hidden: widths of the trunk.
        heads: column -> number of its labels, at least 2.
    """

    def __init__(self, width: int, *, hidden: Sequence[int], heads: Mapping[str, int]) -> None:
        super().__init__()
        widths = [width, *hidden]
        self.trunk = nn.ModuleList(
            nn.Linear(before, behind) for before, behind in zip(widths, hidden, strict=False)
        )
        self.heads = nn.ModuleDict(
            {f"of_{name}": nn.Linear(widths[-1], count) for name, count in heads.items()}
        )

    def forward(self, u: Tensor) -> dict[str, Tensor]:
        """Column -> logits (N, labels)."""
        for linear in self.trunk:
            u = linear(u).relu()
        return {name.removeprefix("of_"): head(u) for name, head in self.heads.items()}


class Adversaries(nn.Module):
    """One `Adversary` for each layer of the core encoder, and one for z.

    Args:
        widths: layer -> its width.
        hidden: of each trunk.
        heads: column -> number of labels; those of fewer than 2 are left out.
    """

    def __init__(
        self, widths: Mapping[str, int], *, hidden: Sequence[int], heads: Mapping[str, int]
    ) -> None:
        super().__init__()
        self.heads = {name: count for name, count in heads.items() if count > 1}
        self.layers = nn.ModuleDict(
            {
                name: Adversary(width, hidden=hidden, heads=self.heads)
                for name, width in widths.items()
            }
        )

    def forward(
        self, hidden: Mapping[str, Tensor], classes: Mapping[str, Tensor], weights: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss of the classifiers, and each column's share of cells that z gives away.

        The mean over layers and columns of CE / log(labels): 1 is a classifier that knows nothing,
        whatever the number of labels. Cells with an unknown label take no part.

        Args:
            hidden: layer -> values (N, W).
            classes: column -> classes (N,), `IGNORED_LABEL` where unknown.
            weights: for each column in the order of `heads`, the factor from a sum over this
                process' cells to its share of the mean over all.
        """
        columns = list(self.heads)
        total = next(iter(hidden.values())).new_zeros(())
        right = {}
        for layer, adversary in self.layers.items():
            for place, (name, logits) in enumerate(adversary(hidden[layer]).items()):
                summed = F.cross_entropy(
                    logits, classes[name], ignore_index=IGNORED_LABEL, reduction="sum"
                )
                total = total + summed * weights[place] / math.log(self.heads[name])
                hits = (logits.detach().argmax(-1) == classes[name]).sum()
                right[name] = hits * weights[place]  # of the last layer, which is z
        return total / max(len(self.layers) * len(columns), 1), right

    def counts(self, classes: Mapping[str, Tensor]) -> Tensor:
        """Cells with a known label, for each column in the order of `heads`."""
        found = [(classes[name] != IGNORED_LABEL).sum() for name in self.heads]
        return torch.stack(found) if found else torch.zeros(0)
