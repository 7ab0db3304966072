"""Modality dropout: training takes away more than the data lack, anew in every epoch.

Axes: B samples, M modalities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mm_moe.batch import Sample
from mm_moe.data.chance import numbers
from mm_moe.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ModalityDropout:
    """Takes each modality of each training sample by itself, by keyed hash of sample and epoch.

    A sample that would be left with nothing keeps what it has. Source: ModDrop (Neverova et al.
    2016), which also drops single channels.

    Attributes:
        rate: chance that a modality which is there is taken.
        dataset: name of the data set.
        seed: another seed, other draws.

    Raises:
        ConfigError: the rate is no chance below 1.
    """

    rate: float
    dataset: str
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise ConfigError(f"--modality_dropout {self.rate} must lie in [0, 1); try 0.3.")

    def __call__(self, samples: Sequence[Sample], present_BM: Tensor) -> Tensor:
        """What is left of what is there: bool (B, M)."""
        left_BM = present_BM.clone()
        for row, sample in enumerate(samples):
            key = f"{sample.epoch}/{sample.mask_key}"
            stream = numbers(key, purpose="mod_dropout", dataset=self.dataset, seed=self.seed)
            for m in range(present_BM.shape[1]):
                left_BM[row, m] &= next(stream) / 2**64 >= self.rate
        return torch.where(left_BM.any(-1, keepdim=True), left_BM, present_BM)
