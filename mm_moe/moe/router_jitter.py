"""Top-k routing of slightly scaled inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from mm_moe.moe.context import TokenContext
from mm_moe.moe.noise import Noise, uniform_by_place
from mm_moe.moe.router import Routing, TopKSoftmaxRouter
from mm_moe.moe.settings import MoESettings


class JitterTopKRouter(TopKSoftmaxRouter):
    """Top-k softmax whose input is multiplied by U(1 - eps, 1 + eps), value by value, in training.

    Source: the policy "Jitter" of DeepSpeed's gate, from Switch (Fedus et al. 2022). Logits,
    weights and losses are those of the jittered input; the experts see the clean one.
    """

    def __init__(self, *, width: int, settings: MoESettings) -> None:
        super().__init__(width=width, settings=settings)
        self.width = width

    def wanted_noise(self) -> Noise | None:
        """A uniform value for each feature of a token."""
        return Noise(uniform_by_place, self.width) if self.settings.jitter_eps else None

    def forward(
        self, x_TD: Tensor, context: TokenContext | None = None, noise: Tensor | None = None
    ) -> Routing:
        """Route each token by itself; `noise` lies between 0 and 1."""
        if noise is not None:
            dtype = torch.promote_types(x_TD.dtype, torch.float32)
            factor_TD = 1 + self.settings.jitter_eps * (2 * noise - 1)
            x_TD = x_TD.to(dtype) * factor_TD.to(dtype)
        return super().forward(x_TD, context)
