"""What a sparse layer is made of: the part of a model's configuration that this room reads."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from mm_moe.errors import ConfigError
from mm_moe.registry import ROUTERS, nearest

_OFF_AT_ZERO = (
    "load_balance_coef",
    "router_z_coef",
    "noise_std",
    "jitter_eps",
    "local_entropy_coef",
    "global_entropy_coef",
    "bias_update_rate",
    "num_modalities",
    "num_shared_experts",
    "num_shared_candidates",
)

LOSS_SETTINGS = (  # which may differ between modalities
    "load_balance_coef",
    "router_z_coef",
    "local_entropy_coef",
    "global_entropy_coef",
    "global_entropy_threshold",
)


@dataclass(frozen=True)
class MoESettings:
    """Settings of one sparse layer; stored as a dict in a model's `config.json`.

    Attributes:
        num_experts: experts of the layer over all processes.
        top_k: experts that each token visits.
        router: name in the registry of routers, or `pkg.mod:Class`.
        load_balance_coef: weight of the router's balance loss (0 turns it off).
        router_z_coef: weight of the router z-loss (0 turns it off).
        drop_tokens: True gives each expert a capacity and drops the least probable rows beyond it;
            False (default) computes every row.
        capacity_factor: capacity relative to an even load while training.
        eval_capacity_factor: the same outside training.
        min_capacity: rows that an expert takes at least.
        noise_std: noise of the router `noisy_topk`, times 1 / num_experts.
        jitter_eps: half width of the factor around 1 of the router `jitter_topk`.
        slots_per_expert: slots that each expert has for a sequence, of the router `soft_slots`.
        local_entropy_coef: weight of the tokens' mean entropy (LIMoE; 0 turns it off).
        global_entropy_coef: weight of the missing entropy of the mean distribution (LIMoE).
        global_entropy_threshold: entropy (nats) from which the global loss is 0; log(S) lets a
            modality settle on S experts. None for log(num_experts), the most there is.
        bias_update_rate: step of the bias that balances the choices of `topk_softmax` and
            `topk_sigmoid` without a loss (DeepSeek-V3: 0.001; 0 turns it off).
        by_modality: modality -> its own values of `LOSS_SETTINGS`, the settings of the losses:
            {"text": {"local_entropy_coef": 0.04}} (LIMoE asks texts alone to be decided).
        modalities: names in the model's order; the model fills them in.
        num_modalities: of the model, which fills it in; for `by_modality` and `by_combination`.
        num_interactions: types of interaction that `by_interaction` tells apart.
        num_shared_candidates: the last so many experts, which `noisy_candidates` offers to tokens
            of every modality beside the modality's own.
        use_residual: mix the experts' output with a dense feed-forward's.
        num_shared_experts: feed-forwards that every token visits besides its choices.
        renormalise: False multiplies a softmax router's choices by their raw probabilities (Switch,
            and DeepSpeed's layer at top_k 1); True (default) makes them sum to 1.

    Raises:
        ConfigError: a value that cannot work.
    """

    num_experts: int = 4
    top_k: int = 1
    router: str = "topk_softmax"
    load_balance_coef: float = 0.01
    router_z_coef: float = 0.001
    drop_tokens: bool = False
    capacity_factor: float = 1.25
    eval_capacity_factor: float = 2.0
    min_capacity: int = 4
    noise_std: float = 1.0
    jitter_eps: float = 0.01
    slots_per_expert: int = 1
    local_entropy_coef: float = 0.0
    global_entropy_coef: float = 0.0
    global_entropy_threshold: float | None = None
    bias_update_rate: float = 0.0
    by_modality: dict[str, dict[str, float]] | None = None
    modalities: list[str] = dataclasses.field(default_factory=list)  # as JSON gives it back
    num_modalities: int = 0
    num_interactions: int = 4
    num_shared_candidates: int = 0
    use_residual: bool = False
    num_shared_experts: int = 0
    renormalise: bool = True

    def __post_init__(self) -> None:
        if self.num_experts < 1:
            raise ConfigError(f"moe.num_experts ({self.num_experts}) must be at least 1.")
        if not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(
                f"moe.top_k ({self.top_k}) must lie between 1 and moe.num_experts "
                f"({self.num_experts}); try top_k={min(max(self.top_k, 1), self.num_experts)}."
            )
        for name in _OFF_AT_ZERO:
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(
                    f"moe.{name} ({getattr(self, name)}) must be finite and not negative; "
                    "0 turns it off."
                )
        for name in ("slots_per_expert", "num_interactions"):
            if getattr(self, name) < 1:
                raise ConfigError(f"moe.{name} ({getattr(self, name)}) must be at least 1.")
        if not 0 <= (self.global_entropy_threshold or 0) < float("inf"):
            raise ConfigError(
                f"moe.global_entropy_threshold ({self.global_entropy_threshold}) must be an "
                f"entropy in nats, 0 to log(num_experts) "
                f"= {math.log(self.num_experts):.3f}; None is that."
            )
        for name in ("capacity_factor", "eval_capacity_factor", "min_capacity"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(
                    f"moe.{name} ({getattr(self, name)}) must be finite and above 0; "
                    "drop_tokens=False does without a capacity."
                )
        if self.use_residual and self.num_shared_experts:
            raise ConfigError(
                f"moe.use_residual and moe.num_shared_experts ({self.num_shared_experts}) exclude "
                "each other; set num_shared_experts=0 or use_residual=False."
            )
        if not self.renormalise and self.router != "topk_softmax":
            raise ConfigError(
                f"moe.renormalise=False is for the router topk_softmax, not {self.router!r}; leave "
                "it out."
            )
        ROUTERS.check(self.router)
        self._check_by_modality()

    def _check_by_modality(self) -> None:
        for name, values in (self.by_modality or {}).items():
            where = f"moe.by_modality[{name!r}]"
            if self.modalities and name not in self.modalities:
                raise ConfigError(
                    f"{where}: no such modality; {nearest(name, list(self.modalities))}"
                )
            if not isinstance(values, dict):
                raise ConfigError(f"{where} ({values!r}) must be an object of settings.")
            for key, value in values.items():
                if key not in LOSS_SETTINGS:
                    raise ConfigError(f"{where}.{key}; {nearest(key, list(LOSS_SETTINGS))}")
                if isinstance(value, bool) or not isinstance(value, (int, float)):
                    raise ConfigError(f"{where}.{key} ({value!r}) must be a number.")
            own: dict[str, Any] = values
            dataclasses.replace(self, by_modality=None, **own)  # refuses what cannot work

    def of_modality(self, index: int | None) -> MoESettings:
        """The settings for the tokens of one modality, by its place in the model's order."""
        if not self.by_modality or index is None or index >= len(self.modalities):
            return self
        own: dict[str, Any] = self.by_modality.get(self.modalities[index], {})
        return dataclasses.replace(self, by_modality=None, **own)

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
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(
                f"a moe setting has a value of a wrong type: {' '.join(str(error).split())}; "
                f"they are {values}."
            ) from error

    def asdict(self) -> dict[str, Any]:
        """A plain dict that `from_dict` reads back."""
        return dataclasses.asdict(self)
