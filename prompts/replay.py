"""Replay prompts: early features are kept in buffers and replayed into the deep blocks.

Our reading of "Buffer replay enhances the robustness of multimodal learning under missing-modality"
(Zhu et al., 2025; the released code has neither a cache nor a replay). Every constant and these
parts are ours: slots that read the row's own tokens, the adapter of the bypass, the mean token in
the cache, replay into the tower's own tokens, gates per channel. The published figure also draws a
mean-squared error between buffers without saying of what; it is left out.

In each tower, with n private and n shared tokens (slots) before its own, and one attention head
`read` from slots to own tokens:
  entry 0 of the cache, before block 0:  slots_0 = buffers + read(buffers, own)
  early blocks j:  slots enter as slots_(j-1) + rho_j * adapter(what came out);
      entry j of the cache:  the slots that came out + what these read
  deep blocks l:   slots += gate_l * sum_j a_lj entry_j
                   own tokens += lift_l(sum_j b_lj [what entry j read, mean own token at entry j])
with a_l and b_l learned distributions over the entries. Gates and lifts start at zero, so that the
deep blocks start as they are. A block whose tokens attend backwards only (CLIP's text) still has
the whole text before each token: the slots stand first and have read it.

Axes: N packed rows, L tokens, D width, S slots (private and shared), J cached blocks,
R replaying blocks, K patterns, n tokens of a buffer, C width of the shared buffer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_moe.batch import pattern_index
from prompts.base import Edit, Prompt
from prompts.replay_options import ReplayOptions
from prompts.replay_tower import TowerReplay


class ReplayPrompt(Prompt):
    """Private and shared buffers per missing pattern, with feature aggregation and replay.

    Args:
        widths: modality -> D.
        num_blocks: modality -> blocks of its tower.
        modalities: in their fixed order.
        options: fields of `ReplayOptions`.

    Raises:
        ConfigError: an option that is unknown or cannot work with these towers.
    """

    def __init__(
        self,
        *,
        widths: Mapping[str, int],
        num_blocks: Mapping[str, int],
        modalities: tuple[str, ...],
        **options: Any,
    ) -> None:
        super().__init__(widths=widths, num_blocks=num_blocks, modalities=modalities)
        self.options = ReplayOptions.from_dict(options)
        self.initial_samples = self.options.initial_samples
        self.towers = nn.ModuleDict(
            {
                name: TowerReplay(
                    options=self.options,
                    width=widths[name],
                    num_patterns=self.num_patterns,
                    num_early=self.options.num_early(name, num_blocks[name]),
                    deep=self.options.deep(name, num_blocks[name]),
                )
                for name in modalities
            }
        )
        self.shared_KnC: nn.Parameter | None = None
        if self.options.shared:
            shape = (2 ** len(modalities) - 1, self.options.length, self.options.shared_width)
            self.shared_KnC = nn.Parameter(torch.empty(shape))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Random buffers around zero; the towers' parts reset themselves."""
        if self.shared_KnC is not None:
            nn.init.normal_(self.shared_KnC)

    def initialise(self, tokens: Mapping[str, Tensor]) -> None:
        """Start both buffers of each tower around the mean of the task's own first tokens."""
        for name, tokens_TD in tokens.items():
            self._tower(name).initialise(tokens_TD)

    def start(self, present_BM: Tensor, rows: Mapping[str, Tensor]) -> dict[str, Edit]:
        """Gather each row's buffers by its pattern and open an empty cache."""
        edits: dict[str, Edit] = {}
        for name, rows_N in rows.items():
            shared_NnC = None
            if self.shared_KnC is not None:
                shared_NnC = self.shared_KnC[pattern_index(present_BM[rows_N]) - 1]
            pattern_N = self.pattern_rows(name, present_BM, rows_N)
            edits[name] = self._tower(name).start(pattern_N, shared_NnC)
        return edits

    def losses(self) -> dict[str, Tensor]:
        """{"orthogonality"}: mean squared cosine between private and shared tokens, weighted.

        Over all patterns, so that every process computes the same whatever its batch holds. The
        source writes the squared Frobenius norm of the product of the normalised buffers; the mean
        over pairs makes the weight independent of their length.
        """
        coefficient = self.options.orthogonality_coef
        if self.shared_KnC is None or not self.options.private or coefficient == 0:
            return {}
        terms = []
        for m, name in enumerate(self.modalities):
            tower = self._tower(name)
            shared_KnD = tower.from_shared(
                self.shared_KnC[self.full_patterns(m).to(self.shared_KnC.device) - 1]
            )
            private_KnD = F.normalize(tower.private_KnD, dim=-1)
            cosine_Knn = private_KnD @ F.normalize(shared_KnD, dim=-1).transpose(1, 2)
            terms.append(cosine_Knn.square().mean())
        return {"orthogonality": coefficient * torch.stack(terms).mean()}

    def _tower(self, name: str) -> TowerReplay:
        return self.towers[name]  # type: ignore[return-value]
