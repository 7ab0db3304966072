"""What a prompt is: learned edits to the towers of a backbone, chosen by what each row lacks.

A prompt sees presence, never payloads. In each forward pass it hands one edit object to every
tower; all state of the pass lives in these objects.

Axes: B samples, M modalities, N packed rows of one modality, L tokens, D a tower's width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mm_moe.batch import pattern_index
from mm_moe.errors import ConfigError

MAX_MODALITIES = 8  # tables hold a row per pattern: 2 ** (M - 1) each


class Edit:
    """One tower's edits in one forward pass; this one changes nothing.

    Attributes:
        prefix: number of extra tokens that stand before the tower's own at this moment.
    """

    prefix: int = 0

    def before(
        self, layer: int, x_NLD: Tensor, mask_NL: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens and mask that enter block `layer`."""
        return x_NLD, mask_NL

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values (N, P, D) that every token of block `layer` also attends to, or None."""
        return None

    def after(self, layer: int, x_NLD: Tensor, mask_NL: Tensor | None) -> Tensor:
        """Tokens that leave block `layer`."""
        return x_NLD


class Prompt(nn.Module):
    """Base of all prompts, for any number of modalities and any missing pattern.

    Args:
        widths: modality -> D of its tower.
        num_blocks: modality -> number of blocks of its tower.
        modalities: the model's modalities in their fixed order.

    Attributes:
        initial_samples: training samples that `initialise` wants to see; 0 when it needs none.
        generates: whether `generate` gives tokens for the modalities that samples lack.
    """

    initial_samples: int = 0
    generates: bool = False

    def __init__(
        self,
        *,
        widths: Mapping[str, int],
        num_blocks: Mapping[str, int],
        modalities: tuple[str, ...],
    ) -> None:
        super().__init__()
        self.widths = dict(widths)
        self.num_blocks = dict(num_blocks)
        self.modalities = tuple(modalities)

    def start(self, present_BM: Tensor, rows: Mapping[str, Tensor]) -> dict[str, Edit]:
        """Begin a forward pass.

        Args:
            present_BM: bool (B, M), which modalities each sample has.
            rows: modality -> (N,) positions of its packed rows in the batch, N >= 1, followed by
                those of the samples for which its tokens are generated.

        Returns:
            One edit per modality of `rows`. Modalities left out are not edited.
        """
        raise NotImplementedError

    def generate(
        self, present_BM: Tensor, sources: Mapping[str, tuple[Tensor, Tensor | None]]
    ) -> dict[str, Tensor]:
        """Tokens for the modalities that samples lack; called first, and only if `generates`.

        Args:
            present_BM: bool (B, M).
            sources: modality -> tokens (N, L, W) and mask (N, L) that say what its packed rows
                hold: the memory of a tower that has one, else what enters block 0; one blank row
                where N would be 0. Without a mask every row has L tokens. A prompt that generates
                takes `source_widths`, modality -> W.

        Returns:
            Modality -> tokens (G, P, W), one row for each sample that lacks it, in order; P is L
            where there is no mask.
        """
        raise NotImplementedError

    def losses(self) -> dict[str, Tensor]:
        """Terms to add to the training loss, coefficients applied."""
        return {}

    def initialise(self, tokens: Mapping[str, Tensor]) -> None:
        """Start the prompt from the task's own data.

        Args:
            tokens: modality -> (T, D), tokens that enter the tower's first block, of a sample of
                the training rows. The same on every process.
        """

    def anchor(self, vectors: Mapping[str, Tensor]) -> None:
        """Start the prompt from its towers; called once more whenever their weights are replaced.

        Args:
            vectors: modality -> (D,), embedding of the token that the tower's feature is read from;
                towers without such a token are left out.
        """

    def freeze_fixed(self) -> None:
        """Stop the training of parts that stay as drawn; loading a model makes all trainable."""

    def depth(self, layers: int | None) -> int:
        """How many of the first blocks of every tower are prompted.

        Args:
            layers: as asked for; None means half of the blocks of the shallowest tower.

        Raises:
            ConfigError: fewer than none or more than the shallowest tower has.
        """
        shallowest = min(self.num_blocks[name] for name in self.modalities)
        depth = max(1, shallowest // 2) if layers is None else layers
        if not 0 <= depth <= shallowest:
            raise ConfigError(
                f"prompt layers ({depth}) must lie between 0 (no prompt) and {shallowest}, the "
                "blocks of the shallowest tower."
            )
        return depth

    def pattern_rows(self, modality: str, present_BM: Tensor, rows_N: Tensor) -> Tensor:
        """Row (N,) of each packed sample in a modality's table of 2 ** (M - 1) patterns.

        The patterns of the other modalities, in binary: this modality is there, or the sample would
        have no packed row. With two modalities: 1 complete, 0 the other one is missing.
        """
        m = self.modalities.index(modality)
        others = [i for i in range(len(self.modalities)) if i != m]
        return pattern_index(present_BM[rows_N][:, others])

    def full_patterns(self, m: int) -> Tensor:
        """Pattern index (2 ** (M - 1),) of each row of modality m's table: bit m put back, set."""
        others_K = torch.arange(self.num_patterns, device="cpu")  # also where weights are on "meta"
        low_K = others_K % 2**m
        return low_K + 2**m + (others_K - low_K) * 2

    @property
    def num_patterns(self) -> int:
        """Rows of a modality's table: patterns in which the modality is present.

        Raises:
            ConfigError: more modalities than a table is made for.
        """
        if len(self.modalities) > MAX_MODALITIES:
            raise ConfigError(
                "this prompt keeps a table row per missing pattern and takes at most "
                f"{MAX_MODALITIES} modalities, not {len(self.modalities)}; use prompt 'none'."
            )
        return 2 ** (len(self.modalities) - 1)


class NoPrompt(Prompt):
    """No parameters and no edits: the plain backbone, exactly."""

    def start(self, present_BM: Tensor, rows: Mapping[str, Tensor]) -> dict[str, Edit]:
        """No edits."""
        return {}


def extend_mask(mask_NL: Tensor | None, extra: int) -> Tensor | None:
    """The mask with `extra` prefix tokens: real in real rows, not in the blank row."""
    if mask_NL is None or extra == 0:
        return mask_NL
    return torch.cat([mask_NL[:, :1].expand(-1, extra), mask_NL], dim=1)
