"""Generative, missing-signal and missing-type prompts (MPLMM): what is missing is generated.

Source: Guo, Jin and Zhao, "Multimodal Prompt Learning with Missing Modalities for Sentiment
Analysis and Emotion Recognition", ACL 2024, for three modalities on one transformer of width 30:
  generative: tokens of a missing modality come from learned tokens and the sequences of those that
      are there; its tower then runs on them, and its feature is no zero;
  signal: a learned offset of each modality's tokens says whether they are its own or generated;
  types: tokens made of all modalities' signals stand before each tower's own.
Where we differ: any number of modalities; towers have widths of their own, so a linear map leads
from the width d of the prompt to each; one map over time per missing modality, to which absent ones
give zeros, where the source has one per set of present ones; sequences of any length are averaged
in T steps first, and a signal is the same at every step, because a row's prompt must not depend on
its batch; type tokens stand at the front and start small but not at zero (the source's product of
two zeros never learns).

Axes: B samples, M modalities, N packed rows, G rows that lack a modality, L tokens, D a tower's
width, W of its source, d the prompt's width, p learned tokens, T steps.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_moe.errors import ConfigError
from prompts.base import Edit, Prompt, extend_mask

STD = 0.02


class GenerativePrompt(Prompt):
    """Generates the tokens of missing modalities and tells the towers what is missing.

    Args:
        widths: modality -> D.
        source_widths: modality -> W, width of what its tower reads a sample from; None: D, as in
            all towers but those with a memory (the Q-Former over an image's patches).
        num_blocks: modality -> blocks of its tower.
        modalities: in their fixed order, two or more.
        length: p, learned tokens of each modality, and type tokens before each tower's own.
        width: d.
        steps: T, steps into which a sequence is averaged; tokens that are generated for a tower
            that takes any number (one that takes a fixed number gets each repeated).
        generative: generate the tokens of missing modalities; off, their towers do not run.
        signal: add the signals to the tokens.
        types: put type tokens before the tower's own.

    Raises:
        ConfigError: numbers that are not positive, one modality, or parts that do nothing alone.
    """

    def __init__(
        self,
        *,
        widths: Mapping[str, int],
        source_widths: Mapping[str, int] | None = None,
        num_blocks: Mapping[str, int],
        modalities: tuple[str, ...],
        length: int = 16,
        width: int = 30,
        steps: int = 16,
        generative: bool = True,
        signal: bool = True,
        types: bool = True,
    ) -> None:
        super().__init__(widths=widths, num_blocks=num_blocks, modalities=modalities)
        if min(length, width, steps) < 1:
            raise ConfigError(
                f"prompt length ({length}), width ({width}) and steps ({steps}) must be positive."
            )
        if not (generative or types):
            raise ConfigError(
                "without generative and types the prompt cannot tell what is missing; use 'none'."
            )
        if len(modalities) < 2:
            raise ConfigError(
                "the generative prompt needs two modalities or more; use prompt 'none'."
            )
        self.generates, self.steps, self.signal = generative, steps, signal
        self.seeds, self.signals = nn.ParameterDict(), nn.ParameterDict()
        self.types, self.lifts = nn.ParameterDict(), nn.ParameterDict()
        self.pairs, self.fusers, self.ups = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.source_ups = nn.ModuleDict()  # of the towers for whose sources `ups` has no width
        sources = widths if source_widths is None else source_widths
        num_others = len(modalities) - 1
        for name in modalities:
            if signal or types:
                self.signals[name] = nn.Parameter(torch.empty(2, steps, width))
            if signal or (generative and sources[name] == widths[name]):
                self.ups[name] = nn.Linear(width, widths[name], bias=False)
            if generative and sources[name] != widths[name]:
                self.source_ups[name] = nn.Linear(width, sources[name], bias=False)
            if types:
                self.types[name] = nn.Parameter(torch.empty(length, width))
                self.lifts[name] = nn.Parameter(torch.empty(len(modalities), steps, widths[name]))
            if generative:
                self.seeds[name] = nn.Parameter(torch.empty(length, width))
                others = [other for other in modalities if other != name]
                self.pairs[name] = nn.ModuleDict({a: nn.Linear(sources[a], width) for a in others})
                self.fusers[name] = nn.Linear(length + num_others * steps, steps)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Type tokens of about the size of the signals, which are small; nothing is zero."""
        for table in (*self.signals.values(), *self.seeds.values()):
            nn.init.normal_(table, std=STD)
        for table in self.types.values():
            nn.init.normal_(table, std=table.shape[1] ** -0.5)
        for table in self.lifts.values():
            nn.init.normal_(table, std=(table.shape[0] * table.shape[1]) ** -0.5)

    def generate(
        self, present_BM: Tensor, sources: Mapping[str, tuple[Tensor, Tensor | None]]
    ) -> dict[str, Tensor]:
        """Tokens (G, T or L, W) of each modality for the samples that lack it."""
        steps = {name: in_steps(*tokens, self.steps) for name, tokens in sources.items()}
        generated = {}
        for m, name in enumerate(self.modalities):
            x_BTW = self._generate(name, present_BM, steps)
            x_NLW, mask_NL = sources[name]
            if mask_NL is None:  # the tower takes L tokens, no more and no less
                places_L = torch.arange(x_NLW.shape[1], device=x_BTW.device)
                x_BTW = x_BTW[:, places_L * self.steps // len(places_L)]
            generated[name] = x_BTW[~present_BM[:, m]].to(x_NLW.dtype)
        return generated

    def _generate(self, name: str, present_BM: Tensor, steps: Mapping[str, Tensor]) -> Tensor:
        """One modality's tokens (B, T, W) for every sample, from the modalities it has."""
        parts = [self.seeds[name].expand(len(present_BM), -1, -1)]
        for a, other in enumerate(self.modalities):
            if other == name:
                continue
            y_NTd = F.gelu(self.pairs[name][other](steps[other]))  # type: ignore[index]
            # A blank row is cut off, but stays in the graph: the same one on every process.
            rows_N = present_BM[:, a].nonzero().squeeze(1)
            zeros_BTd = y_NTd.new_zeros(len(present_BM), *y_NTd.shape[1:])
            parts.append(zeros_BTd.index_copy(0, rows_N, y_NTd[: len(rows_N)]))
        joint_BdS = torch.cat(parts, dim=1).transpose(1, 2)
        up = self.source_ups[name] if name in self.source_ups else self.ups[name]
        return up(F.gelu(self.fusers[name](joint_BdS)).transpose(1, 2))

    def start(self, present_BM: Tensor, rows: Mapping[str, Tensor]) -> dict[str, Edit]:
        """Each row's signal, by whether its tokens are its own, and its type tokens."""
        edits: dict[str, Edit] = {}
        state_BMTd = None
        if self.signals:
            state_BMTd = torch.stack(
                [
                    self.signals[name][present_BM[:, m].long()]
                    for m, name in enumerate(self.modalities)
                ],
                dim=1,
            )
        for name, rows_N in rows.items():
            m = self.modalities.index(name)
            offset_N1D = types_NpD = None
            if state_BMTd is not None and self.signal:
                offset_N1D = self.ups[name](state_BMTd[rows_N, m].mean(1, keepdim=True))
            if state_BMTd is not None and name in self.types:
                mixed_NdD = torch.einsum("nmtd,mtw->ndw", state_BMTd[rows_N], self.lifts[name])
                types_NpD = self.types[name] @ mixed_NdD
            edits[name] = GenerativeEdit(offset_N1D, types_NpD)
        return edits


class GenerativeEdit(Edit):
    """One tower's signal and type tokens, both at block 0.

    Args:
        offset_N1D: added to every token, or None.
        types_NpD: put before them, or None.
    """

    def __init__(self, offset_N1D: Tensor | None, types_NpD: Tensor | None) -> None:
        self.offset_N1D, self.types_NpD = offset_N1D, types_NpD

    def before(
        self, layer: int, x_NLD: Tensor, mask_NL: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Add the signal, then prepend."""
        if layer > 0:
            return x_NLD, mask_NL
        if self.offset_N1D is not None:
            x_NLD = x_NLD + self.offset_N1D.to(x_NLD.dtype)
        if self.types_NpD is None:
            return x_NLD, mask_NL
        self.prefix = self.types_NpD.shape[1]
        tokens_NLD = torch.cat([self.types_NpD.to(x_NLD.dtype), x_NLD], dim=1)
        return tokens_NLD, extend_mask(mask_NL, self.prefix)


def in_steps(x_NLD: Tensor, mask_NL: Tensor | None, steps: int) -> Tensor:
    """Means (N, T, D) of a row's n real tokens over T even parts; parts without a token are zero.

    Token i of n belongs to part floor(i T / n), however far the row is padded.
    """
    if mask_NL is None:
        mask_NL = x_NLD.new_ones(x_NLD.shape[:2], dtype=torch.bool)
    order_NL = mask_NL.cumsum(1) - 1
    part_NL = order_NL.clamp(min=0) * steps // mask_NL.sum(1, keepdim=True).clamp(min=1)
    member_NLT = F.one_hot(part_NL, steps) * mask_NL[..., None]
    share_NLT = member_NLT / member_NLT.sum(1, keepdim=True).clamp(min=1)
    return share_NLT.to(x_NLD.dtype).transpose(1, 2) @ x_NLD
