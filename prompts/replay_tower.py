"""The replay prompt's part in one tower: buffers, reader, bypass, cache, aggregation and gates.

Axes: N packed rows, L tokens, D width, S slots (private and shared), J entries of the cache,
R replaying blocks, K patterns, n tokens of a buffer, C width of the shared buffer, P width of a
cached summary, H inner width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prompts.base import Edit, extend_mask
from prompts.replay_options import ReplayOptions

INITIAL_BYPASS = 0.1  # share of a block's output that enters the carried slots at the start


class Bottleneck(nn.Module):
    """P -> H -> D with a GELU, on normalised input.

    Args:
        width_in: P.
        width: D.
        hidden: H.
        starts_at_zero: put out zero until trained.
        dropout: share of the H inner values that is dropped in training.
    """

    def __init__(
        self,
        width_in: int,
        width: int,
        hidden: int,
        *,
        starts_at_zero: bool,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(width_in, hidden)
        self.up = nn.Linear(hidden, width)
        self.starts_at_zero = starts_at_zero
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As the library draws them, the last layer at zero where it has to be."""
        self.down.reset_parameters()
        self.up.reset_parameters()
        if self.starts_at_zero:
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., P) -> (..., D)."""
        return self.up(self.dropout(F.gelu(self.down(normalised(x)))))


class Reader(nn.Module):
    """One attention head from the slots to the tower's own tokens.

    Args:
        width: D.
        hidden: H, width of queries and keys.
        dropout: share of what is read that is dropped in training.
    """

    def __init__(self, width: int, hidden: int, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.query = nn.Linear(width, hidden)
        self.key = nn.Linear(width, hidden, bias=False)  # softmax does not see a key's bias
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, slots_NSD: Tensor, own_NLD: Tensor, mask_NL: Tensor | None) -> Tensor:
        """What each slot reads (N, S, D); only real tokens are read."""
        allowed = None
        if mask_NL is not None:
            allowed = mask_NL[:, None].clone()
            allowed[..., 0] = True  # the blank row has no real token, but needs finite numbers
        own_NLD = normalised(own_NLD)
        y_NSD = F.scaled_dot_product_attention(
            self.query(normalised(slots_NSD)),
            self.key(own_NLD),
            self.value(own_NLD),
            attn_mask=allowed,
        )
        return self.out(self.dropout(y_NSD))


class TowerReplay(nn.Module):
    """Parameters of one tower.

    Args:
        options: which parts exist.
        width: D.
        num_patterns: K, rows of the private table.
        num_early: blocks whose output is cached; with the entry before block 0 these are J - 1.
        deep: blocks that get the replay.
    """

    def __init__(
        self,
        *,
        options: ReplayOptions,
        width: int,
        num_patterns: int,
        num_early: int,
        deep: list[int],
    ) -> None:
        super().__init__()
        self.options = options
        self.width = width
        self.num_early = num_early
        self.deep = deep if options.replay else []
        self.reads = options.read and options.num_slots > 0
        hidden = max(1, width // options.bottleneck)
        if options.private:
            self.private_KnD = nn.Parameter(torch.empty(num_patterns, options.length, width))
        if options.shared:
            self.from_shared = nn.Linear(options.shared_width, width)
        if self.reads:
            self.read = Reader(width, hidden, dropout=options.dropout)
        self.has_bypass = options.bypass and options.num_slots > 0 and num_early > 1
        if self.has_bypass:
            self.adapter = Bottleneck(width, width, hidden, starts_at_zero=False)
            self.bypass_J = nn.Parameter(torch.empty(num_early - 1))
        if options.replay:
            self._build_replay(hidden)
        self.reset_parameters()

    def _build_replay(self, hidden: int) -> None:
        options, shape_RJ = self.options, (len(self.deep), self.num_early + 1)
        summary = self.width * (2 if self.reads else 1)
        if options.num_slots:
            if options.aggregation == "learned":
                self.slot_weight_RJ = nn.Parameter(torch.empty(shape_RJ))
            if options.gated:
                self.slot_gate_RD = nn.Parameter(torch.empty(len(self.deep), self.width))
        if options.replay_tokens:
            if options.aggregation == "learned":
                self.token_weight_RJ = nn.Parameter(torch.empty(shape_RJ))
            self.lift = nn.ModuleList(
                Bottleneck(
                    summary, self.width, hidden, starts_at_zero=True, dropout=options.dropout
                )
                for _ in self.deep
            )
        if options.aggregation == "attention":
            self.query = nn.Linear(self.width, hidden)
            self.key = nn.Linear(summary, hidden, bias=False)

    def reset_parameters(self) -> None:
        """Buffers around zero, uniform aggregation, closed gates."""
        options = self.options
        if options.private:
            nn.init.normal_(self.private_KnD, std=options.noise)
        if options.shared:
            std = options.noise / math.sqrt(options.shared_width)
            nn.init.normal_(self.from_shared.weight, std=std)
            nn.init.zeros_(self.from_shared.bias)
        if self.has_bypass:
            nn.init.constant_(self.bypass_J, INITIAL_BYPASS)
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith(("gate_RD", "weight_RJ")):
                nn.init.zeros_(parameter)

    @torch.no_grad()
    def initialise(self, tokens_TD: Tensor) -> None:
        """Centre both buffers on the mean token, spread like the tokens times `noise`."""
        mean_D, std_D = tokens_TD.float().mean(0), tokens_TD.float().std(0)
        options = self.options
        if options.private:
            noise_KnD = torch.randn_like(self.private_KnD) * std_D * options.noise
            self.private_KnD.copy_(mean_D + noise_KnD)
        if options.shared:
            scale_D = std_D * options.noise / math.sqrt(options.shared_width)
            weight_DC = self.from_shared.weight
            weight_DC.copy_(torch.randn_like(weight_DC) * scale_D[:, None])
            self.from_shared.bias.copy_(mean_D)

    def start(self, pattern_N: Tensor, shared_NnC: Tensor | None) -> Edit:
        """The edit of one pass: slots of each row's pattern, an empty cache."""
        slots = []
        if self.options.private:
            slots.append(self.private_KnD[pattern_N])
        if shared_NnC is not None:
            slots.append(self.from_shared(shared_NnC))
        return ReplayEdit(self, torch.cat(slots, dim=1) if slots else None)

    def weights(self, which: str, replay: int, query_ND: Tensor, cache: Cache) -> Tensor:
        """Distribution over the entries of the cache, (J,) or per row (N, J).

        Args:
            which: "slot" or "token", which have learned weights of their own.
            replay: index of the replaying block among all of them.
            query_ND: the row's present mean token, for attention.
            cache: what the early blocks left.
        """
        if self.options.aggregation == "learned":
            table_RJ = self.slot_weight_RJ if which == "slot" else self.token_weight_RJ
            return table_RJ[replay].softmax(-1)
        if self.options.aggregation == "attention":
            query_NH = self.query(normalised(query_ND))
            key_NJH = self.key(normalised(torch.stack(cache.summaries, dim=1)))
            score_NJ = torch.einsum("nh,njh->nj", query_NH, key_NJH)
            return (score_NJ / math.sqrt(query_NH.shape[-1])).softmax(-1)
        weight_J = query_ND.new_full((self.num_early + 1,), 1 / (self.num_early + 1))
        if self.options.aggregation == "last":
            weight_J = torch.zeros_like(weight_J)
            weight_J[-1] = 1
        return weight_J


class Cache:
    """The entries of one pass: slots (N, S, D) and summaries of the row (N, P)."""

    def __init__(self) -> None:
        self.slots: list[Tensor] = []
        self.summaries: list[Tensor] = []


class ReplayEdit(Edit):
    """One pass through one tower.

    Args:
        tower: the parameters.
        slots_NSD: tokens to put before the tower's own, or None without buffers.
    """

    def __init__(self, tower: TowerReplay, slots_NSD: Tensor | None) -> None:
        self.tower = tower
        self.slots_NSD = slots_NSD
        self.cache = Cache()

    def before(
        self, layer: int, x_NLD: Tensor, mask_NL: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Insert the slots, carry them past the early blocks, or replay the cache."""
        tower = self.tower
        if layer == 0:
            return self._insert(x_NLD, mask_NL)
        if tower.has_bypass and layer < tower.num_early:
            slots_NSD, own_NLD = x_NLD[:, : self.prefix], x_NLD[:, self.prefix :]
            share = tower.bypass_J[layer - 1]
            self.slots_NSD = self.slots_NSD + share * tower.adapter(slots_NSD)
            return torch.cat([self.slots_NSD, own_NLD], 1), mask_NL
        if layer in tower.deep:
            return self._replay(tower.deep.index(layer), x_NLD, mask_NL), mask_NL
        return x_NLD, mask_NL

    def after(self, layer: int, x_NLD: Tensor, mask_NL: Tensor | None) -> Tensor:
        """Cache what an early block put out."""
        if self.tower.options.replay and layer < self.tower.num_early:
            own_mask_NL = None if mask_NL is None else mask_NL[:, self.prefix :]
            self._keep(x_NLD[:, : self.prefix], x_NLD[:, self.prefix :], own_mask_NL)
        return x_NLD

    def _insert(self, x_NLD: Tensor, mask_NL: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Put the slots, with what they read, before the tower's own tokens."""
        slots_NSD = x_NLD[:, :0] if self.slots_NSD is None else self.slots_NSD.to(x_NLD.dtype)
        self.slots_NSD = self._keep(slots_NSD, x_NLD, mask_NL)
        self.prefix = slots_NSD.shape[1]
        return torch.cat([self.slots_NSD, x_NLD], 1), extend_mask(mask_NL, self.prefix)

    def _keep(self, slots_NSD: Tensor, own_NLD: Tensor, mask_NL: Tensor | None) -> Tensor:
        """Make an entry of the cache; the slots with what they read."""
        summary_NP = mean_token(own_NLD, mask_NL)
        if self.tower.reads:
            read_NSD = self.tower.read(slots_NSD, own_NLD, mask_NL)
            slots_NSD = slots_NSD + read_NSD
            summary_NP = torch.cat([read_NSD.mean(1), summary_NP], dim=-1)
        self.cache.slots.append(slots_NSD)
        self.cache.summaries.append(summary_NP)
        return slots_NSD

    def _replay(self, replay: int, x_NLD: Tensor, mask_NL: Tensor | None) -> Tensor:
        tower, options = self.tower, self.tower.options
        slots_NSD, own_NLD = x_NLD[:, : self.prefix], x_NLD[:, self.prefix :]
        query_ND = mean_token(own_NLD, None if mask_NL is None else mask_NL[:, self.prefix :])
        if options.num_slots:
            weight = tower.weights("slot", replay, query_ND, self.cache)
            gate_D = tower.slot_gate_RD[replay] if options.gated else 1.0
            slots_NSD = slots_NSD + gate_D * mix(weight, self.cache.slots)
        if options.replay_tokens:
            weight = tower.weights("token", replay, query_ND, self.cache)
            mixed_NP = mix(weight, [normalised(entry_NP) for entry_NP in self.cache.summaries])
            own_NLD = own_NLD + tower.lift[replay](mixed_NP)[:, None]
        return torch.cat([slots_NSD, own_NLD], 1)


def mean_token(own_NLD: Tensor, mask_NL: Tensor | None) -> Tensor:
    """Mean (N, D) of the real tokens; zero for a row without any."""
    if mask_NL is None:
        return own_NLD.mean(1)
    real_NL1 = mask_NL[..., None].to(own_NLD.dtype)
    return (own_NLD * real_NL1).sum(1) / real_NL1.sum(1).clamp(min=1)


def normalised(x: Tensor) -> Tensor:
    """Layer norm without parameters."""
    return F.layer_norm(x, x.shape[-1:])


def mix(weight: Tensor, cached: list[Tensor]) -> Tensor:
    """Weighted sum of J cached tensors (N, ..., D); weight (J,) or (N, J)."""
    stacked = torch.stack(cached, dim=-1)
    if weight.ndim == 1:
        return stacked @ weight.to(stacked.dtype)
    shape = (weight.shape[0], *(1,) * (stacked.ndim - 2), weight.shape[1])
    return (stacked * weight.view(shape)).sum(-1)
