"""Tokens, presence and supports for tests of fills.

B samples, M modalities, P tokens, H width, Q cells of one modality, S supports, N of one cell.
"""

import torch

from mm_moe.fill.base import FillShape, SupportTokens

NAMES = ("a", "b", "c")
P, H = 2, 8
SHAPE = FillShape(NAMES, P, H)
PRESENT = torch.tensor(
    [[1, 1, 1], [1, 0, 1], [0, 1, 0], [1, 1, 0], [0, 0, 1], [1, 0, 0]], dtype=torch.bool
)
EMPTY = ("b", 0)  # a cell (modality, which of its cells) without supports


def tokens_of(present_BM, *, dtype=torch.float32, seed=0):
    """Modality -> (B, P, H), zero where missing."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*present_BM.shape, P, H, generator=generator, dtype=torch.float64)
    x = (x * present_BM[:, :, None, None]).to(dtype)
    return {name: x[:, m].clone() for m, name in enumerate(NAMES)}


def supports_of(present_BM, *, count=3, dtype=torch.float32, seed=1, empty=EMPTY):
    """Modality -> supports; the rows have every modality, and are the same for all of them."""
    generator = torch.Generator().manual_seed(seed)
    found, size = {}, 5
    for m, name in enumerate(NAMES):
        x_SPH = torch.randn(size, P, H, generator=generator, dtype=torch.float64).to(dtype)
        num_cells = int((~present_BM[:, m]).sum())
        rows_QN = torch.empty(num_cells, count, dtype=torch.int64)
        for rows_N in rows_QN:
            rows_N.copy_(torch.randperm(size, generator=generator)[:count])
        if empty is not None and name == empty[0] and num_cells:
            rows_QN[empty[1]] = -1
        if num_cells > 1:
            rows_QN[-1, -1] = -1  # a pool that had too few
        found[name] = SupportTokens(
            x_SPH, rows_QN, torch.ones(size, len(NAMES), dtype=torch.bool), torch.arange(size) + 10
        )
    return found
