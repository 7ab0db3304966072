"""Models of their own kind: no backbone with a head, but trained, saved and published as one is.

What a program has to know of a model beside its forward pass stands here once. An objective names
the model that it trains by `model_type`, a name in the registry `MODELS`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from mm_moe.data.schema import DataSource
from mm_moe.errors import ConfigError
from mm_moe.models.loading import load_whole
from mm_moe.moe.layer import MoELayer
from prompts.base import Prompt

Processor = Callable[[list[Any]], dict[str, Tensor]]


class OwnModel(PreTrainedModel):
    """Base of models of their own kind.

    Attributes:
        modalities: of the batches, in order.
        prompts: none.
    """

    main_input_name = "present"
    modalities: tuple[str, ...]
    prompts: tuple[Prompt, ...] = ()

    @classmethod
    @abstractmethod
    def config_for(cls, source: DataSource, options: Mapping[str, Any]) -> PreTrainedConfig:
        """The configuration for a data set.

        Args:
            source: what the model is trained on.
            options: the fields that a user sets (`--model_config`).

        Raises:
            ConfigError: an unknown option, or data that the model does not take.
        """

    @classmethod
    def count_experts(cls, source: DataSource) -> int:
        """Experts that can be placed on different processes; 1 for a model without such."""
        return 1

    @abstractmethod
    def processors(self) -> dict[str, Processor]:
        """Modality -> function from a list of raw values to the tensors that `forward` takes."""

    def sparse_layers(self) -> dict[str, MoELayer]:
        """None."""
        return {}

    def initialise_prompt(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Nothing: there is no prompt."""

    def freeze(
        self, lock: Iterable[str] = (), *, experts: bool = False, unlock_blocks: int = 0
    ) -> None:
        """Nothing, without a word of towers.

        Raises:
            ConfigError: a tower to lock.
        """
        names = list(lock)
        if names:
            raise ConfigError(
                f"cannot lock {names[0]!r}: a {self.config.model_type} has no towers; leave the "
                "lock out."
            )

    def trainable_report(self) -> list[tuple[str, int]]:
        """(part, number of trainable values)."""
        return [(name, count_trainable(part)) for name, part in self.named_children()]

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: a checkpoint of such a model is whole, and a new one draws its own weights."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in the library, but weights that are missing or do not fit are an error.

        Raises:
            CheckpointError: names the first tensor.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = load_whole(super().from_pretrained, args, kwargs)
        return (model, info) if wants_info else model


def count_trainable(part: nn.Module) -> int:
    """Trainable values of a module."""
    return sum(entry.numel() for entry in part.parameters() if entry.requires_grad)
