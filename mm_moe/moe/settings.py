"""What a sparse layer is made of: the part of a model's configuration that this room reads."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from mm_moe.errors import ConfigError
from mm_moe.registry import ROUTERS, nearest


@dataclass(frozen=True)
class MoESettings:
    """Settings of one sparse layer; stored as a dict in a model's `config.json`.

    Attributes:
        num_experts: experts of the layer over all processes.
        top_k: experts that each token visits.
        router: name in the registry of routers, or `pkg.mod:Class`.
        load_balance_coef: weight of the load-balance loss (0 turns it off).
        router_z_coef: weight of the router z-loss (0 turns it off).

    Raises:
        ConfigError: a value that cannot work.
    """

    num_experts: int = 4
    top_k: int = 1
    router: str = "topk_softmax"
    load_balance_coef: float = 0.01
    router_z_coef: float = 0.001

    def __post_init__(self) -> None:
        if self.num_experts < 1:
            raise ConfigError(f"moe.num_experts ({self.num_experts}) must be at least 1.")
        if not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(
                f"moe.top_k ({self.top_k}) must lie between 1 and moe.num_experts "
                f"({self.num_experts}); try top_k={min(max(self.top_k, 1), self.num_experts)}."
            )
        for name in ("load_balance_coef", "router_z_coef"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(
                    f"moe.{name} ({getattr(self, name)}) must be finite and not negative; "
                    f"0 turns the loss off."
                )
        ROUTERS.check(self.router)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MoESettings:
        """Build settings from a stored dict.

        Raises:
            ConfigError: an unknown key (the nearest ones are named) or a value that cannot work.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(f"unknown moe setting {key!r}; {nearest(key, known)}")
        return cls(**values)

    def asdict(self) -> dict[str, Any]:
        """A plain dict that `from_dict` reads back."""
        return dataclasses.asdict(self)
