"""What the two REP prompts share: private tokens with residual generators, common, dynamic tokens.

Source: the released code of "Buffer replay enhances the robustness of multimodal learning under
missing-modality" (Zhu et al., 2025). It replays nothing: it is DCP (`prompts.correlated`) with
wider generators that have a skip, a learned share of each block's new tokens, and buffers that
start at the embeddings of CLIP's end-of-text and class tokens. See `prompts.replay` for the method
that the paper describes.

    block 0:     p_0 = F_0(LN_0 [p of all towers])
    block l < S: p_l = a F_l(LN_l [p_(l-1) of all towers]) + (1 - a) p_(l-1)
    common:      G(C_k), once; dynamic: one attention head from queries q_k to the row's own tokens

Axes: N packed rows, L tokens, D width, n tokens of a group, W sum of all towers' widths, C width of
the common table, Q patterns with something present, S prompted blocks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_moe.errors import ConfigError
from mm_moe.registry import nearest
from prompts.correlated import DynamicAttention, PatternPrompt

QUERY_STD = 0.02


@dataclass(frozen=True)
class ResidualOptions:
    """The parts of a REP prompt; the defaults are those of the released code.

    Attributes:
        length: n, tokens of each of the three groups.
        layers: S, blocks that get new private tokens; None means half of the blocks of the
            shallowest tower (the source: 6 of 12), 0 no prompt at all.
        common_width: C.
        hidden: inner width of the generators.
        dropout: within the generators; drawn once per pattern, not per sample.
        noise: spread of the initial buffers around their base vectors.
        private: keep the private group.
        shared: keep the common group.
        dynamic: keep the dynamic group.
        train_queries: train the queries of the dynamic group; off, they stay as drawn.
        train_attention: train the attention of the dynamic group; off, it stays as drawn.
        attend_padding: let the dynamic group attend to padding. A row then depends on how far its
            batch is padded, unless all are filled up (`pad_text` of the model's configuration), as
            the source fills every text to 77 tokens.
        bounded_share: keep the share of new tokens between 0 and 1 and out of weight decay.
        relative_noise: noise of `noise` times the length of the base vector in every table.
    """

    length: int = 12
    layers: int | None = None
    common_width: int = 512
    hidden: int = 256
    dropout: float = 0.1
    noise: float = 0.2
    private: bool = True
    shared: bool = True
    dynamic: bool = True
    train_queries: bool = False
    train_attention: bool = False
    attend_padding: bool = False
    bounded_share: bool = False
    relative_noise: bool = False

    def __post_init__(self) -> None:
        if min(self.length, self.common_width, self.hidden) < 1:
            raise ConfigError(
                f"prompt length ({self.length}), common_width ({self.common_width}) and hidden "
                f"({self.hidden}) must be positive."
            )
        if not 0 <= self.dropout < 1 or self.noise <= 0:
            raise ConfigError(
                f"prompt dropout ({self.dropout}) must lie in [0, 1) and noise ({self.noise}) must "
                "be positive."
            )
        if not (self.private or self.shared or self.dynamic):
            raise ConfigError("every group of the prompt is off; use prompt 'none'.")

    def changed(self, options: Mapping[str, Any]) -> ResidualOptions:
        """These with other values; ConfigError for an unknown name, with the nearest ones."""
        known = [field.name for field in dataclasses.fields(self)]
        for name in options:
            if name not in known:
                raise ConfigError(f"unknown prompt option {name!r}; {nearest(name, known)}")
        return dataclasses.replace(self, **options)


class ResidualPrompt(PatternPrompt):
    """Private, common and dynamic tokens with residual generators, for M >= 2 modalities.

    Where we differ from the source: any number of modalities; frozen queries are saved with the
    model instead of drawn anew in each run; generators run once per pattern; its network that no
    forward pass calls is left out, as is the bias of the attention's keys, which softmax ignores.

    Args:
        widths: modality -> D.
        num_blocks: modality -> blocks of its tower.
        modalities: in their fixed order.
        options: fields of `ResidualOptions` that differ from the class's `defaults`.

    Raises:
        ConfigError: an option that is unknown or cannot work with these towers.
    """

    defaults: ClassVar[ResidualOptions] = ResidualOptions()

    def __init__(
        self,
        *,
        widths: Mapping[str, int],
        num_blocks: Mapping[str, int],
        modalities: tuple[str, ...],
        **options: Any,
    ) -> None:
        super().__init__(widths=widths, num_blocks=num_blocks, modalities=modalities)
        self.options = self.defaults.changed(options)
        self.layers = self.depth(self.options.layers)
        self.states = nn.ParameterDict()  # modality -> rows for "absent" and "present"
        self.norms = nn.ModuleDict()
        self.generators = nn.ModuleDict()
        self.common_generators = nn.ModuleDict()
        self.queries = nn.ParameterDict()
        self.attention = nn.ModuleDict()
        self.common: nn.Parameter | None = None
        self.share: nn.Parameter | None = None
        if self.layers:
            self._build()
            self.reset_parameters()
            self.freeze_fixed()

    def _build(self) -> None:
        options, num_present = self.options, 2 ** len(self.modalities) - 1
        total = sum(self.widths[name] for name in self.modalities)
        for name in self.modalities:
            width = self.widths[name]
            if options.private:
                self.states[name] = nn.Parameter(torch.empty(2, options.length, width))
                self.norms[name] = nn.ModuleList(nn.LayerNorm(total) for _ in range(self.layers))
                self.generators[name] = nn.ModuleList(
                    self._generator(total, width) for _ in range(self.layers)
                )
            if options.shared:
                self.common_generators[name] = self._generator(options.common_width, width)
            if options.dynamic:
                shape = (num_present, options.length, width)
                self.queries[name] = nn.Parameter(torch.empty(shape))
                self.attention[name] = BufferAttention(width, attend_padding=options.attend_padding)
        if options.shared:
            shape = (num_present, options.length, options.common_width)
            self.common = nn.Parameter(torch.empty(shape))
        if options.private and self.layers > 1:
            # The optimizer decays what has two dimensions or more, as the source decays its share.
            self.share = nn.Parameter(torch.empty((1,) if options.bounded_share else (1, 1)))

    def _generator(self, width_in: int, width_out: int) -> ResidualGenerator:
        options = self.options
        return ResidualGenerator(
            width_in, width_out=width_out, hidden=options.hidden, dropout=options.dropout
        )

    def reset_parameters(self) -> None:
        """Noise around zero in the private tables, half of each block's tokens new."""
        for table in self.queries.values():
            nn.init.normal_(table, std=QUERY_STD)
        for table in self.states.values():
            self._draw(table, None)
        if self.common is not None:
            base_Q1C = F.normalize(torch.randn_like(self.common[:, :1]), dim=-1)
            noise_QnC = torch.randn_like(self.common)
            if self.options.relative_noise:
                noise_QnC = F.normalize(noise_QnC, dim=-1)
            with torch.no_grad():
                self.common.copy_(base_Q1C + self.options.noise * noise_QnC)
        if self.share is not None:
            nn.init.constant_(self.share, 0.0 if self.options.bounded_share else 0.5)

    def freeze_fixed(self) -> None:
        """Queries and attention of the dynamic group, unless they are trained."""
        self.queries.requires_grad_(self.options.train_queries)
        self.attention.requires_grad_(self.options.train_attention)

    def anchor(self, vectors: Mapping[str, Tensor]) -> None:
        """Start the private tables around the towers' own vectors; without one, around zero."""
        for name, table in self.states.items():
            self._draw(table, vectors.get(name))

    @torch.no_grad()
    def _draw(self, table: Tensor, base_D: Tensor | None) -> None:
        """Rows base + noise * (a random direction), relative to the length of the base or not."""
        noise = self.options.noise * F.normalize(torch.randn_like(table), dim=-1)
        if base_D is not None:
            base_D = base_D.to(table)
            noise = base_D + (base_D.norm() if self.options.relative_noise else 1.0) * noise
        table.copy_(noise)

    def private_tokens(self) -> dict[str, list[Tensor]]:
        """Modality -> tokens (Q, n, D) of each prompted block, for every pattern; none if off."""
        tokens: dict[str, list[Tensor]] = {name: [] for name in self.modalities}
        if not self.states:
            return tokens
        device = next(self.parameters()).device
        pattern_Q = torch.arange(1, 2 ** len(self.modalities), device=device)
        current = {
            name: self.states[name][pattern_Q >> m & 1] for m, name in enumerate(self.modalities)
        }
        for layer in range(self.layers):
            joint_QnW = torch.cat([current[name] for name in self.modalities], dim=-1)
            for name in self.modalities:
                norm, generator = self.norms[name][layer], self.generators[name][layer]  # type: ignore[index]
                new_QnD = generator(norm(joint_QnW))
                tokens[name].append(self._mixed(layer, new_QnD, current[name]))
            current = {name: tokens[name][-1] for name in self.modalities}
        return tokens

    def _mixed(self, layer: int, new_QnD: Tensor, old_QnD: Tensor) -> Tensor:
        if layer == 0 or self.share is None:
            return new_QnD
        share = self.share.sigmoid() if self.options.bounded_share else self.share
        return share * new_QnD + (1 - share) * old_QnD


class ResidualGenerator(nn.Module):
    """W2 dropout(GELU(LN(W1 x))) + skip(x); the skip is the identity where widths agree.

    Args:
        width_in: of x.
        width_out: of the result.
        hidden: inner width.
        dropout: of the inner values.
    """

    def __init__(self, width_in: int, *, width_out: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.down = nn.Linear(width_in, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.up = nn.Linear(hidden, width_out)
        self.skip = nn.Identity() if width_in == width_out else nn.Linear(width_in, width_out)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """(..., width_in) -> (..., width_out)."""
        inner = F.gelu(self.norm(self.down(x)))
        return self.up(F.dropout(inner, self.dropout, self.training)) + self.skip(x)


class BufferAttention(DynamicAttention):
    """The dynamic group's attention head, drawn as `nn.MultiheadAttention` draws its weights.

    Args:
        width: D.
        attend_padding: attend to padding too.
    """

    def __init__(self, width: int, *, attend_padding: bool) -> None:
        super().__init__(width)
        self.attend_padding = attend_padding
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier over the three input maps stacked; biases zero. The output map keeps its own."""
        width = self.query.in_features
        bound = math.sqrt(6 / (4 * width))
        for linear in (self.query, self.key, self.value):
            nn.init.uniform_(linear.weight, -bound, bound)
        for linear in (self.query, self.value, self.out):
            nn.init.zeros_(linear.bias)

    def forward(self, query_NnD: Tensor, x_NLD: Tensor, mask_NL: Tensor | None) -> Tensor:
        """Tokens (N, n, D) that sum up the row's own."""
        return super().forward(query_NnD, x_NLD, None if self.attend_padding else mask_NL)
