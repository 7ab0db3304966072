"""Missing-aware prompts (MAP): one set of tokens per missing pattern, at the first blocks.

Source: Lee et al., "Multimodal Prompting with Missing Modalities for Visual Recognition", CVPR
2023. There one encoder reads both modalities; here each tower has its own sets. We start from small
noise (theirs: `init="one_hot"`) and take half of the blocks where theirs takes 6 of 12.

Axes: N packed rows, L tokens, D width, P prompt tokens, K patterns, S prompted blocks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mm_moe.errors import ConfigError
from prompts.base import Edit, Prompt, extend_mask

MODES = ("input", "attention")
INITS = ("noise", "one_hot")


class MissingAwarePrompt(Prompt):
    """Prompt tokens chosen by each row's missing pattern.

    Args:
        widths: modality -> D.
        num_blocks: modality -> blocks of its tower.
        modalities: in their fixed order.
        length: P, tokens per prompted block.
        mode: "input" prepends P tokens at each prompted block and keeps them, so that the sequence
            grows by P each time; "attention" gives the block P / 2 keys and P / 2 values instead.
        layers: how many of the first blocks are prompted; None means half of them,
            0 none.
        init: "noise", or the source's "one_hot": zeros, but ones in the token whose place is the
            pattern (0 complete, 1 first modality missing, 2 the second, 3 both, ...; places wrap
            around at P), and in attention mode in the same place of keys and of values.
        std: standard deviation of the noise.

    Raises:
        ConfigError: an unknown mode or init, an odd length in attention mode, or more layers than
            blocks.
    """

    def __init__(
        self,
        *,
        widths: Mapping[str, int],
        num_blocks: Mapping[str, int],
        modalities: tuple[str, ...],
        length: int = 16,
        mode: str = "input",
        layers: int | None = None,
        init: str = "noise",
        std: float = 0.02,
    ) -> None:
        super().__init__(widths=widths, num_blocks=num_blocks, modalities=modalities)
        if mode not in MODES:
            raise ConfigError(f"prompt mode {mode!r} is unknown; known: {', '.join(MODES)}.")
        if length < 1 or (mode == "attention" and length % 2):
            raise ConfigError(
                f"prompt length ({length}) must be positive, and even in attention mode (half "
                f"keys, half values); try length={max(2, length + length % 2)}."
            )
        if init not in INITS:
            raise ConfigError(f"prompt init {init!r} is unknown; known: {', '.join(INITS)}.")
        self.mode = mode
        self.init = init
        self.length = length
        self.std = std
        self.tables = nn.ParameterDict()
        for name in modalities:
            depth = max(1, num_blocks[name] // 2) if layers is None else layers
            if not 0 <= depth <= num_blocks[name]:
                raise ConfigError(
                    f"prompt layers ({depth}) must lie between 0 (no prompt) and the "
                    f"{num_blocks[name]} blocks of the {name} tower."
                )
            if depth == 0:
                continue
            shape = (self.num_patterns, depth, length, widths[name])
            self.tables[name] = nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small noise, or ones in the place of each pattern."""
        for m, table_KSPD in enumerate(self.tables.values()):
            if self.init == "noise":
                nn.init.normal_(table_KSPD, std=self.std)
                continue
            nn.init.zeros_(table_KSPD)
            groups = 2 if self.mode == "attention" else 1
            size = self.length // groups
            complete = 2 ** len(self.modalities) - 1
            for k, pattern in enumerate(self.full_patterns(m).tolist()):
                for group in range(groups):
                    place = group * size + (complete - pattern) % size
                    nn.init.ones_(table_KSPD[k, :, place])

    def start(self, present_BM: Tensor, rows: Mapping[str, Tensor]) -> dict[str, Edit]:
        """Gather each row's tokens by its pattern."""
        kind = _PrependEdit if self.mode == "input" else _AttentionEdit
        return {
            name: kind(self.tables[name][self.pattern_rows(name, present_BM, rows_N)])
            for name, rows_N in rows.items()
            if name in self.tables
        }


class _PrependEdit(Edit):
    """Prepends the block's tokens and keeps those of the blocks before."""

    def __init__(self, tokens_NSPD: Tensor) -> None:
        self.tokens_NSPD = tokens_NSPD

    def before(
        self, layer: int, x_NLD: Tensor, mask_NL: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if layer >= self.tokens_NSPD.shape[1]:
            return x_NLD, mask_NL
        tokens_NPD = self.tokens_NSPD[:, layer].to(x_NLD.dtype)
        self.prefix += tokens_NPD.shape[1]
        return torch.cat([tokens_NPD, x_NLD], dim=1), extend_mask(mask_NL, tokens_NPD.shape[1])


class _AttentionEdit(Edit):
    """Gives the block's attention keys and values of its own."""

    def __init__(self, tokens_NSPD: Tensor) -> None:
        self.tokens_NSPD = tokens_NSPD

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor] | None:
        if layer >= self.tokens_NSPD.shape[1]:
            return None
        key_NPD, value_NPD = self.tokens_NSPD[:, layer].chunk(2, dim=1)
        return key_NPD, value_NPD
