"""The parts of a replay prompt, as options that are checked before a model is built."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mm_moe.errors import ConfigError
from mm_moe.registry import nearest

AGGREGATIONS = ("learned", "attention", "mean", "last")


@dataclass(frozen=True)
class ReplayOptions:
    """The parts of a replay prompt; each can be switched off.

    Attributes:
        length: n, tokens of the private and of the shared buffer.
        shared_width: C, width of the shared buffer before it is projected to each tower.
        private: keep a private buffer per modality and pattern.
        shared: keep a shared buffer per pattern, common to the towers.
        read: let the slots read the tower's own tokens, before the first block and after each early
            one, so that buffers and cache hold features of the row; off, they depend on its missing
            pattern alone.
        bypass: carry the slots past the early blocks; off, each block's output is the next input.
        replay: replay the cache into the deep blocks; off, nothing is cached.
        aggregation: how the cache's entries are combined: "learned" weights, "attention" of the
            row's present mean token over its cached ones, their "mean", or the "last" alone.
        replay_tokens: replay into the tower's own tokens too, not only the slots.
        gated: learn gates of the slots' replay that start at zero; off, it is added as it is.
        cache_layers: how many of the first blocks are early; None means half of them.
        replay_layers: deep blocks that get the replay; None means all after the early ones.
        bottleneck: the adapters and the readers' scores are narrower than the tower by this factor.
        dropout: in training, share of what is read and of the lifts' inner values that is dropped.
            Runs with dropout do not follow one curve over different numbers of processes.
        noise: spread of the buffers around the task's mean token, relative to the tokens' spread;
            before `initialise` has seen the task, standard deviation around zero.
        orthogonality_coef: weight of the loss that keeps private and shared buffers apart.
        initial_samples: start both buffers around the mean first token of so many training samples
            (the source's task-aware initialisation); 0 starts them around zero.
    """

    length: int = 4
    shared_width: int = 64
    private: bool = True
    shared: bool = True
    read: bool = True
    bypass: bool = True
    replay: bool = True
    aggregation: str = "learned"
    replay_tokens: bool = True
    gated: bool = True
    cache_layers: int | None = None
    replay_layers: Sequence[int] | None = None
    bottleneck: int = 2
    dropout: float = 0.0
    noise: float = 0.2
    orthogonality_coef: float = 0.1
    initial_samples: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, bool) and not isinstance(value, bool):
                raise ConfigError(f"prompt {field.name} ({value!r}) must be true or false.")
        for name in ("length", "shared_width", "bottleneck"):
            if getattr(self, name) < 1:
                raise ConfigError(f"prompt {name} ({getattr(self, name)}) must be at least 1.")
        if self.aggregation not in AGGREGATIONS:
            raise ConfigError(
                f"prompt aggregation {self.aggregation!r} is unknown; "
                f"known: {', '.join(AGGREGATIONS)}."
            )
        if self.noise <= 0 or self.orthogonality_coef < 0:
            raise ConfigError(
                f"prompt noise ({self.noise}) must be positive and orthogonality_coef "
                f"({self.orthogonality_coef}) not negative."
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"prompt dropout ({self.dropout}) must lie in [0, 1).")
        if self.initial_samples < 0:
            raise ConfigError(
                f"prompt initial_samples ({self.initial_samples}) must not be negative; 0 is off."
            )
        if not (self.private or self.shared or (self.replay and self.replay_tokens)):
            raise ConfigError("every part of the replay prompt is off; use prompt 'none'.")

    @classmethod
    def from_dict(cls, options: Mapping[str, Any]) -> ReplayOptions:
        """Options from a dict; ConfigError for an unknown one, with the nearest names."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                raise ConfigError(f"unknown replay option {name!r}; {nearest(name, known)}")
        return cls(**options)

    @property
    def num_slots(self) -> int:
        """S."""
        return self.length * (int(self.private) + int(self.shared))

    def num_early(self, name: str, num_blocks: int) -> int:
        """J, number of early blocks of a tower."""
        early = num_blocks // 2 if self.cache_layers is None else self.cache_layers
        if not 1 <= early < num_blocks:
            raise ConfigError(
                f"prompt cache_layers ({early}) must lie between 1 and {num_blocks - 1}: the "
                f"{name} tower has {num_blocks} blocks, and one at least has to follow the cache."
            )
        return early

    def deep(self, name: str, num_blocks: int) -> list[int]:
        """The blocks of a tower that get the replay."""
        early = self.num_early(name, num_blocks)
        deep = range(early, num_blocks) if self.replay_layers is None else self.replay_layers
        for layer in deep:
            if not early <= layer < num_blocks:
                raise ConfigError(
                    f"prompt replay_layers names block {layer} of the {name} tower; the replay can "
                    f"enter blocks {early} to {num_blocks - 1}."
                )
        if self.replay and not deep:
            raise ConfigError("prompt replay_layers is empty; switch replay off instead.")
        return sorted(set(deep))
