"""The replay prompt's part in one tower: buffers, bypass, cache, aggregation and gates.

Axes: N packed rows, L tokens, D width, S slots (private and shared), J early blocks,
R replaying blocks, K patterns, n tokens of a buffer, C width of the shared buffer.
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
    """D -> D / factor -> D with a GELU, on normalised input."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__()
        hidden = max(1, width // factor)
        self.down = nn.Linear(width, hidden)
        self.up = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.up(F.gelu(self.down(normalised(x))))


class TowerReplay(nn.Module):
    """Parameters of one tower.

    Args:
        options: which parts exist.
        width: D.
        num_patterns: K, rows of the private table.
        num_early: J, blocks whose output is cached.
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
        if options.private:
            shape = (num_patterns, options.length, width)
            self.private_KnD = nn.Parameter(torch.empty(shape))
        if options.shared:
            self.from_shared = nn.Linear(options.shared_width, width)
        self.has_bypass = options.bypass and options.num_slots > 0 and num_early > 1
        if self.has_bypass:
            self.adapter = Bottleneck(width, options.bottleneck)
            self.bypass_J = nn.Parameter(torch.empty(num_early - 1))
        if options.replay:
            self._build_replay()
        self.reset_parameters()

    def _build_replay(self) -> None:
        options, shape_RD = self.options, (len(self.deep), self.width)
        if options.pooled:
            self.lift = Bottleneck(self.width, options.bottleneck)
        # One cached block leaves nothing to choose between.
        self.aggregation = options.aggregation if self.num_early > 1 else "last"
        if self.aggregation == "learned":
            if options.num_slots:
                self.slot_weight_RJ = nn.Parameter(torch.empty(shape_RD[0], self.num_early))
            if options.pooled:
                self.pooled_weight_RJ = nn.Parameter(torch.empty(shape_RD[0], self.num_early))
        if self.aggregation == "attention":
            self.query = nn.Linear(self.width, max(1, self.width // options.bottleneck))
            self.key = nn.Linear(self.width, self.query.out_features, bias=False)
        if options.gated and options.num_slots:
            self.slot_gate_RD = nn.Parameter(torch.empty(shape_RD))
        if options.gated and options.replay_tokens:
            self.token_gate_RD = nn.Parameter(torch.empty(shape_RD))

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

    def weights(self, which: str, replay: int, query_ND: Tensor | None, cache: Cache) -> Tensor:
        """Distribution over the J cached blocks, (J,) or per row (N, J).

        Args:
            which: "slot" or "pooled", which have learned weights of their own.
            replay: index of the replaying block among all of them.
            query_ND: the row's present pooled tokens, for attention.
            cache: what the early blocks left.
        """
        if self.aggregation == "learned":
            table_RJ = self.slot_weight_RJ if which == "slot" else self.pooled_weight_RJ
            return table_RJ[replay].softmax(-1)
        if self.aggregation == "attention" and query_ND is not None:
            query_NH = self.query(normalised(query_ND))
            key_NJH = self.key(normalised(torch.stack(cache.pooled, dim=1)))
            score_NJ = torch.einsum("nh,njh->nj", query_NH, key_NJH)
            return (score_NJ / math.sqrt(query_NH.shape[-1])).softmax(-1)
        weight_J = cache.pooled[0].new_full((self.num_early,), 1 / self.num_early)
        if self.aggregation == "last":
            weight_J = torch.zeros_like(weight_J)
            weight_J[-1] = 1
        return weight_J


class Cache:
    """What the early blocks put out in one pass: slots (N, S, D) and pooled tokens (N, D) each."""

    def __init__(self) -> None:
        self.slots: list[Tensor] = []
        self.pooled: list[Tensor] = []


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
        if layer == 0 and self.slots_NSD is not None:
            self.prefix = self.slots_NSD.shape[1]
            self.slots_NSD = self.slots_NSD.to(x_NLD.dtype)
            return torch.cat([self.slots_NSD, x_NLD], 1), extend_mask(mask_NL, self.prefix)
        if tower.has_bypass and 0 < layer < tower.num_early:
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
            self.cache.slots.append(x_NLD[:, : self.prefix])
            self.cache.pooled.append(self._pooled(x_NLD, mask_NL))
        return x_NLD

    def _pooled(self, x_NLD: Tensor, mask_NL: Tensor | None) -> Tensor:
        """Mean (N, D) of the tower's own real tokens."""
        own_NLD = x_NLD[:, self.prefix :]
        if mask_NL is None:
            return own_NLD.mean(1)
        real_NL1 = mask_NL[:, self.prefix :, None].to(own_NLD.dtype)
        return (own_NLD * real_NL1).sum(1) / real_NL1.sum(1).clamp(min=1)

    def _replay(self, replay: int, x_NLD: Tensor, mask_NL: Tensor | None) -> Tensor:
        tower, options = self.tower, self.tower.options
        query_ND = self._pooled(x_NLD, mask_NL) if tower.aggregation == "attention" else None
        lifted_N1D = None
        if options.pooled:
            weight = tower.weights("pooled", replay, query_ND, self.cache)
            mixed_ND = mix(weight, [normalised(pooled_ND) for pooled_ND in self.cache.pooled])
            lifted_N1D = tower.lift(mixed_ND)[:, None]
        slots_NSD, own_NLD = x_NLD[:, : self.prefix], x_NLD[:, self.prefix :]
        if options.num_slots:
            weight = tower.weights("slot", replay, query_ND, self.cache)
            replayed_NSD = mix(weight, self.cache.slots)
            if lifted_N1D is not None:
                replayed_NSD = replayed_NSD + lifted_N1D
            gate_D = tower.slot_gate_RD[replay] if options.gated else 1.0
            slots_NSD = slots_NSD + gate_D * replayed_NSD
        if options.replay_tokens and lifted_N1D is not None:
            gate_D = tower.token_gate_RD[replay] if options.gated else 1.0
            own_NLD = own_NLD + gate_D * lifted_N1D
        return torch.cat([slots_NSD, own_NLD], 1)


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
