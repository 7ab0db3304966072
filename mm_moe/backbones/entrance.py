"""What of a batch's rows reaches the blocks of a tower, and rows that a prompt generated.

Axes: N packed rows, G generated rows, L tokens of a row, P generated tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Entrance:
    """What of some rows reaches the blocks of their tower.

    Attributes:
        x_NLD: tokens that enter block 0.
        mask_NL: which of them are real; None: all.
        memory: what the blocks attend to besides, or None.
    """

    x_NLD: Tensor
    mask_NL: Tensor | None
    memory: Tensor | None

    @property
    def source(self) -> tuple[Tensor, Tensor | None]:
        """The tokens that say what the rows hold, and their mask: the memory if there is one."""
        return (self.x_NLD, self.mask_NL) if self.memory is None else (self.memory, None)


@dataclass(frozen=True)
class Generated:
    """Tokens that a prompt made for rows that lack a modality, in place of a `source`.

    Attributes:
        entrance: that of the packed rows, so that it is computed once.
        tokens_GPD: of G further rows.
    """

    entrance: Entrance
    tokens_GPD: Tensor


def append_rows(
    x_NLD: Tensor, mask_NL: Tensor | None, new_GPD: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Tokens (N + G, max(L, P), D), padded on the right, and their mask.

    Without a mask L must be P: nothing could hide the padding.
    """
    new_GP = torch.ones(new_GPD.shape[:2], dtype=torch.bool, device=new_GPD.device)
    num_tokens, num_new = x_NLD.shape[1], new_GPD.shape[1]
    if mask_NL is None:
        assert num_tokens == num_new, "this tower takes a fixed number of tokens"
        return torch.cat([x_NLD, new_GPD]), None
    if num_tokens < num_new:
        x_NLD = F.pad(x_NLD, (0, 0, 0, num_new - num_tokens))
        mask_NL = F.pad(mask_NL, (0, num_new - num_tokens))
    elif num_new < num_tokens:
        new_GPD = F.pad(new_GPD, (0, 0, 0, num_tokens - num_new))
        new_GP = F.pad(new_GP, (0, num_tokens - num_new))
    return torch.cat([x_NLD, new_GPD]), torch.cat([mask_NL, new_GP])
