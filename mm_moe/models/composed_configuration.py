"""What a model of several members is made of, as the `config.json` of a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from mm_moe.batch import IMAGE, TEXT
from mm_moe.errors import ConfigError
from mm_moe.models.combine import MIXTURE, check_combine
from mm_moe.models.configuration import MultimodalMoEConfig

JOIN = "+"  # between the modalities in a member's name
GATE = "gate"  # the member that weighs the others in a mixture


def modalities_of(name: str, modalities: Sequence[str]) -> tuple[str, ...]:
    """The modalities that a member's name joins, in the model's order.

    Raises:
        ConfigError: one is repeated or not among `modalities`.
    """
    parts = name.split(JOIN)
    for part in parts:
        if part not in modalities or parts.count(part) > 1:
            raise ConfigError(
                f"member {name!r} must join modalities of the data by +, each once; they are "
                f"{', '.join(modalities)}."
            )
    return tuple(part for part in modalities if part in parts)


@strict
class ComposedConfig(PreTrainedConfig):
    """Members, each an ordinary model over some of the modalities, and how they are combined.

    Attributes:
        modalities: of the batches, in their fixed order.
        members: name -> the fields of its `MultimodalMoEConfig`. The member "gate" gives one output
            for each other member, in their order: its weight in a mixture.
        combine: "product", "mixture" or "mean".
        frozen: names of members that are not trained.
        label_names: names of the classes.
    """

    model_type = "mm_moe_composed"

    modalities: list[str] | tuple[str, ...] = (IMAGE, TEXT)
    members: dict[str, dict[str, Any]] = field(default_factory=dict)
    combine: str = "product"
    frozen: list[str] | tuple[str, ...] = ()
    label_names: list[str] | tuple[str, ...] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Check members against each other.

        Raises:
            ConfigError: no member, a gate without a mixture or the other way round, modalities or
                outputs that do not fit, or an unknown name in `frozen`.
        """
        self.modalities, self.frozen = list(self.modalities), list(self.frozen)
        if self.label_names is not None:
            self.label_names = list(self.label_names)
            self.id2label = dict(enumerate(self.label_names))
            self.label2id = {name: index for index, name in self.id2label.items()}
        super().__post_init__(**kwargs)
        if self.members:  # the library makes an empty one, too
            self._check_members()

    @property
    def experts(self) -> dict[str, dict[str, Any]]:
        """The members that predict: all but the gate."""
        return {name: fields for name, fields in self.members.items() if name != GATE}

    @property
    def prompt(self) -> str:
        """The prompt of the members, "none" if they have none."""
        found = {str(fields.get("prompt", "none")) for fields in self.members.values()}
        return "+".join(sorted(found - {"none"})) or "none"

    def member_config(self, name: str) -> MultimodalMoEConfig:
        """The configuration of one member."""
        return MultimodalMoEConfig.from_dict(self.members[name])

    def _check_members(self) -> None:
        check_combine(self.combine, self.problem_type)
        if not self.experts:
            raise ConfigError("a composed model needs at least one member besides the gate.")
        if (self.combine == MIXTURE) != (GATE in self.members):
            raise ConfigError(
                f"combine {self.combine!r} with the members {', '.join(self.members)}: a mixture "
                f"needs the member {GATE!r}, and nothing else does."
            )
        for name in self.members:
            own = self.member_config(name)
            lost = [m for m in own.modalities if m not in self.modalities]
            if lost:
                raise ConfigError(
                    f"member {name!r} is over {', '.join(own.modalities)}, the batches have "
                    f"{', '.join(self.modalities)}."
                )
            wanted = len(self.experts) if name == GATE else self.num_labels
            if own.num_labels != wanted:
                raise ConfigError(
                    f"member {name!r} has {own.num_labels} outputs, it must have {wanted}."
                )
        for name in self.frozen:
            if name not in self.members:
                raise ConfigError(
                    f"cannot freeze {name!r}; the members are {', '.join(self.members)}."
                )
