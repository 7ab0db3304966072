"""Deep correlated prompts (DCP): private prompts generated block by block from both towers' own.

Source: Hu et al., "Deep Correlated Prompting for Visual Recognition with Missing Modalities",
NeurIPS 2024. Three groups of tokens stand before a tower's own:
  correlated: block l's tokens of a tower are generated from block l - 1's of all towers, and
      overwrite their slots at each of the first blocks;
  dynamic: learned queries attend to the row's own embedded tokens;
  modal-common: from one table per missing pattern, common to the towers.
Where we differ: any number of modalities (the source pairs two); the queries of the dynamic group
are trained and saved (there they are random constants of each run); the towers' final norms and
projection stay as `freeze` left them; half of the blocks where the source takes 6 of 12; all
generators are run once per pattern, not per sample, and read by pattern.

Axes: N packed rows, L tokens, D width, n tokens of a group, W sum of all towers' widths, C width of
the common table, Q patterns with something present.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_moe.batch import pattern_index
from mm_moe.errors import ConfigError
from prompts.base import Edit, Prompt, extend_mask

STD = 0.02


class PatternPrompt(Prompt):
    """Base of prompts whose tokens depend on the set of present modalities alone.

    Attributes:
        layers: how many of the first blocks get new private tokens; 0 for no prompt at all.
        common: the shared table of the common group, None where it is off.
        common_generators: modality -> tokens of the common group from `common`.
        queries: modality -> queries (Q, n, D) of the dynamic group.
        attention: modality -> what the queries look at the tokens with; empty where it is off.
    """

    layers: int
    common: nn.Parameter | None
    common_generators: nn.ModuleDict
    queries: nn.ParameterDict
    attention: nn.ModuleDict

    @abstractmethod
    def private_tokens(self) -> dict[str, list[Tensor]]:
        """Modality -> tokens (Q, n, D) of each prompted block, for every pattern; none if off."""

    def start(self, present_BM: Tensor, rows: Mapping[str, Tensor]) -> dict[str, Edit]:
        """Generate every pattern's tokens and gather each row's."""
        if not self.layers:
            return {}
        private = self.private_tokens()
        edits: dict[str, Edit] = {}
        for name, rows_N in rows.items():
            pattern_N = pattern_index(present_BM[rows_N]) - 1
            common_NnD = query_NnD = attention = None
            if self.common is not None:
                common_NnD = self.common_generators[name](self.common)[pattern_N]
            if name in self.attention:
                query_NnD, attention = self.queries[name][pattern_N], self.attention[name]
            blocks = [table_QnD[pattern_N] for table_QnD in private[name]]
            edits[name] = CorrelatedEdit(blocks, common_NnD, query_NnD, attention)
        return edits


class CorrelatedPrompt(PatternPrompt):
    """Correlated, dynamic and modal-common prompts.

    Args:
        widths: modality -> D.
        num_blocks: modality -> blocks of its tower.
        modalities: in their fixed order.
        length: n, tokens of each of the three groups.
        layers: how many of the first blocks get new correlated tokens; None means half of the
            blocks of the shallowest tower, 0 no prompt at all.
        common_width: C.
        hidden: inner width of the generators of the correlated group.
        common_hidden: inner width of the generators of the common group.
        correlated: keep the correlated group.
        dynamic: keep the dynamic group.
        common: keep the modal-common group.

    Raises:
        ConfigError: numbers that are not positive, more layers than blocks, or every group off.
    """

    def __init__(
        self,
        *,
        widths: Mapping[str, int],
        num_blocks: Mapping[str, int],
        modalities: tuple[str, ...],
        length: int = 12,
        layers: int | None = None,
        common_width: int = 512,
        hidden: int = 80,
        common_hidden: int = 32,
        correlated: bool = True,
        dynamic: bool = True,
        common: bool = True,
    ) -> None:
        super().__init__(widths=widths, num_blocks=num_blocks, modalities=modalities)
        self.layers = self.depth(layers)
        if not self.layers:
            correlated = dynamic = common = False
        if min(length, common_width, hidden, common_hidden) < 1:
            raise ConfigError(
                f"prompt length ({length}), common_width ({common_width}), hidden ({hidden}) and "
                f"common_hidden ({common_hidden}) must be positive."
            )
        if self.layers and not (correlated or dynamic or common):
            raise ConfigError("every group of the correlated prompt is off; use prompt 'none'.")
        self.length = length
        total = sum(widths[name] for name in modalities)
        num_present = 2 ** len(modalities) - 1
        self.states = nn.ParameterDict()  # modality -> rows for "absent" and "present"
        self.generators = nn.ModuleDict()
        self.norms = nn.ModuleDict()
        self.queries = nn.ParameterDict()
        self.common_generators = nn.ModuleDict()
        for name in modalities:
            width = widths[name]
            if correlated:
                self.states[name] = nn.Parameter(torch.empty(2, length, width))
                self.norms[name] = nn.ModuleList(nn.LayerNorm(total) for _ in range(self.layers))
                self.generators[name] = nn.ModuleList(
                    _generator(total, hidden, width) for _ in range(self.layers)
                )
            if dynamic:
                self.queries[name] = nn.Parameter(torch.empty(num_present, length, width))
            if common:
                self.common_generators[name] = _generator(common_width, common_hidden, width)
        self.attention = nn.ModuleDict(
            {name: DynamicAttention(widths[name]) for name in modalities if dynamic}
        )
        self.common: nn.Parameter | None = None
        if common:
            self.common = nn.Parameter(torch.empty(num_present, length, common_width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Small noise in every table; the generators reset themselves."""
        for table in (*self.states.values(), *self.queries.values()):
            nn.init.normal_(table, std=STD)
        if self.common is not None:
            nn.init.normal_(self.common, std=STD)

    def private_tokens(self) -> dict[str, list[Tensor]]:
        """Modality -> tokens (Q, n, D) of each prompted block, for every pattern; none if off.

        A tower's tokens depend on all modalities' tables, those of absent ones too: what is missing
        shapes the prompt of what is there.
        """
        if not self.states:
            return {name: [] for name in self.modalities}
        device = next(self.parameters()).device
        pattern_Q = torch.arange(1, 2 ** len(self.modalities), device=device)
        current = {
            name: self.states[name][pattern_Q >> m & 1] for m, name in enumerate(self.modalities)
        }
        tokens: dict[str, list[Tensor]] = {name: [] for name in self.modalities}
        for layer in range(self.layers):
            joint_QnW = torch.cat([current[name] for name in self.modalities], dim=-1)
            current = {
                name: self.generators[name][layer](  # type: ignore[index]
                    self.norms[name][layer](joint_QnW)  # type: ignore[index]
                )
                for name in self.modalities
            }
            for name, table_QnD in current.items():
                tokens[name].append(table_QnD)
        return tokens


def _generator(width_in: int, hidden: int, width_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width_in, hidden), nn.GELU(), nn.Linear(hidden, width_out))


class DynamicAttention(nn.Module):
    """One attention head from learned queries to a row's own tokens.

    Args:
        width: D.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)  # softmax does not see a key's bias
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, query_NnD: Tensor, x_NLD: Tensor, mask_NL: Tensor | None) -> Tensor:
        """Tokens (N, n, D) that sum up the real ones of `x_NLD`."""
        allowed = None
        if mask_NL is not None:
            allowed = mask_NL[:, None].clone()
            allowed[..., 0] = True  # the blank row has no real token, but needs finite numbers
        y_NnD = F.scaled_dot_product_attention(
            self.query(query_NnD), self.key(x_NLD), self.value(x_NLD), attn_mask=allowed
        )
        return self.out(y_NnD)


class CorrelatedEdit(Edit):
    """One tower's tokens in one pass: correlated, common, dynamic, then its own."""

    def __init__(
        self,
        blocks: list[Tensor],
        common_NnD: Tensor | None,
        query_NnD: Tensor | None,
        attention: nn.Module | None,
    ) -> None:
        self.blocks = blocks
        self.common_NnD = common_NnD
        self.query_NnD = query_NnD
        self.attention = attention

    def before(
        self, layer: int, x_NLD: Tensor, mask_NL: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Prepend all groups at block 0, then overwrite the correlated group."""
        if layer == 0:
            groups = [tokens_NnD.to(x_NLD.dtype) for tokens_NnD in self.blocks[:1]]
            if self.common_NnD is not None:
                groups.append(self.common_NnD.to(x_NLD.dtype))
            if self.attention is not None:
                groups.append(self.attention(self.query_NnD, x_NLD, mask_NL))
            self.prefix = sum(group.shape[1] for group in groups)
            return torch.cat([*groups, x_NLD], dim=1), extend_mask(mask_NL, self.prefix)
        if layer >= len(self.blocks):
            return x_NLD, mask_NL
        tokens_NnD = self.blocks[layer].to(x_NLD.dtype)
        return torch.cat([tokens_NnD, x_NLD[:, tokens_NnD.shape[1] :]], dim=1), mask_NL
