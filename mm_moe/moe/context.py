"""What a router may know of tokens besides their values.

N rows (samples), L tokens of a row, T real tokens.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenContext:
    """Facts about the rows that a sparse layer works on; all tokens of a row share them.

    A model gives values per row. The layer says with `at` which of the rows' tokens are real, and a
    router reads values per real token (`combination_T` and the like), which are made when asked
    for. Without `at`, each token is a row of its own.

    Attributes:
        modality: place of the rows' modality in the model's fixed order; None where there is none.
        combination: int64 (N,), index of each row's set of present modalities: bit m stands for
            modality m, so 0 is "nothing".
        interaction: int64 (N,), type of the interaction between a row's modalities.
        target: int64 (N,), the modality that a row's tokens shall stand for, where one call works
            on rows of several; None: it is `modality`, for all.
        shape: leading dimensions of the layer's input, (N, L) or (N,).
        real_T: flat places of the real tokens in `shape`; None when all are real.
    """

    modality: int | None = None
    combination: Tensor | None = None
    interaction: Tensor | None = None
    target: Tensor | None = None
    shape: torch.Size | None = None
    real_T: Tensor | None = None

    def at(self, shape: torch.Size, real_T: Tensor | None) -> TokenContext:
        """The same facts about the real tokens of an input with these leading dimensions."""
        return dataclasses.replace(self, shape=shape, real_T=real_T)

    @property
    def combination_T(self) -> Tensor | None:
        """Each real token's combination."""
        return self._of_tokens(self.combination)

    @property
    def interaction_T(self) -> Tensor | None:
        """Each real token's interaction type."""
        return self._of_tokens(self.interaction)

    @property
    def target_T(self) -> Tensor | None:
        """The modality that each real token shall stand for, where rows differ in it."""
        return self._of_tokens(self.target)

    def rows_and_places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Row (T,) of each real token, and its place (T,) within the row."""
        assert self.shape is not None  # the layer said so with `at`
        flat_T = self.real_T
        if flat_T is None:
            flat_T = torch.arange(self.shape.numel(), device=device)
        length = max(1, self.shape[1:].numel())
        return flat_T.div(length, rounding_mode="floor"), flat_T % length

    def _of_tokens(self, value_N: Tensor | None) -> Tensor | None:
        if value_N is None or self.shape is None:
            return value_N
        return value_N.index_select(0, self.rows_and_places(value_N.device)[0])
