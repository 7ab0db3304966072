"""Settings of the interaction experts, and which kinds of interaction a label can tell apart.

K kinds of interaction (one expert or several for each), M modalities.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mm_moe.data.interactions.categories import COARSE, category_names
from mm_moe.errors import ConfigError
from mm_moe.registry import nearest

FINE, COMPATIBLE = "fine", "compatible"
KINDS, TARGETS = (FINE, "coarse"), (COMPATIBLE, "exact")
_WHOLE = ("experts_per_kind", "hidden", "fuser_hidden")
_COARSE_SETS = (3, 1)  # as if U were one modality of two: what R explains, U may explain, too


@dataclass(frozen=True)
class InteractionSettings:
    """Shape and training of the interaction experts; a dict in a model's `config.json`.

    Attributes:
        kinds: "fine" has an expert for each set of modalities that may be right alone (with two
            modalities R, U_<first>, U_<second>, AS and DS), "coarse" has R, U, AS and DS.
            Disagreement synergy (DS) is left out with two classes, where it cannot be.
        experts_per_kind: above 1, a learned gate chooses one of a kind's experts for each sample.
        hidden: hidden width of each expert.
        fuser_hidden: hidden width of the fuser.
        hard: outside training, compute for each sample only the expert with the highest weight;
            else all experts answer and are mixed.
        fuser_coef: weight of the fuser's supervision, where a batch says the kinds.
        fuser_target: "exact" asks the fuser for the kind of the table, as the paper does.
            "compatible" asks for any kind that explains the same predictions and label: where both
            modalities are right, redundancy and either uniqueness do, and the table's R is a name
            for not knowing which.
        own_coef: weight of each expert's loss on its own samples (see `finetune.interaction`).

    Raises:
        ConfigError: a value that cannot work.
    """

    kinds: str = FINE
    experts_per_kind: int = 1
    hidden: int = 64
    fuser_hidden: int = 64
    hard: bool = False
    fuser_coef: float = 1.0
    fuser_target: str = COMPATIBLE
    own_coef: float = 0.0

    def __post_init__(self) -> None:
        for name in _WHOLE:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(
                    f"interaction_experts.{name} ({value!r}) must be a whole number from 1."
                )
        for name, known in (("kinds", KINDS), ("fuser_target", TARGETS)):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(
                    f"interaction_experts.{name} ({value!r}) must be one of {', '.join(known)}."
                )
        if not isinstance(self.hard, bool):
            raise ConfigError(f"interaction_experts.hard ({self.hard!r}) must be true or false.")
        for name in ("fuser_coef", "own_coef"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not 0 <= value < float("inf"):
                raise ConfigError(
                    f"interaction_experts.{name} ({value!r}) must be finite and not negative; "
                    "0 turns it off."
                )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> InteractionSettings:
        """Build settings from a stored dict.

        Raises:
            ConfigError: an unknown key (the nearest ones are named) or a value that cannot work.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise ConfigError(
                    f"unknown interaction_experts setting {key!r}; {nearest(key, known)}"
                )
        return cls(**values)

    def asdict(self) -> dict[str, Any]:
        """A plain dict that `from_dict` reads back."""
        return dataclasses.asdict(self)

    def names(self, modalities: Sequence[str], *, num_labels: int) -> tuple[str, ...]:
        """Names of the K kinds; their order is that of the experts and of a table's codes.

        Raises:
            ConfigError: one modality, which interacts with nothing.
        """
        if len(modalities) < 2:
            raise ConfigError(
                f"interaction experts need two modalities or more, the data have "
                f"{', '.join(modalities)}; leave out --interaction_experts."
            )
        names = category_names(modalities) if self.kinds == FINE else COARSE
        return names if num_labels > 2 else names[:-1]

    def explains(self, num_kinds: int) -> Tensor:
        """Bool (K, K): [c, k] is whether kind k may lie behind a sample that the table calls c.

        Kind k says that a set of modalities is right; the table names the set that was. So k
        explains c if its set is a part of c's. Synergies explain themselves alone.
        """
        if self.fuser_target != COMPATIBLE:
            return torch.eye(num_kinds, dtype=torch.bool)
        everything = 2 ** (num_kinds.bit_length() - 1) - 1  # K is 2**M, or 2**M + 1 with DS
        right = [everything, *range(1, everything)] if self.kinds == FINE else _COARSE_SETS
        table_KK = torch.eye(num_kinds, dtype=torch.bool)
        for c, of_sample in enumerate(right):
            for k, of_kind in enumerate(right):
                table_KK[c, k] = of_sample & of_kind == of_kind
        return table_KK
