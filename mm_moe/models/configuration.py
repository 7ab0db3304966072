"""What a model is made of, as the `config.json` of a Hugging Face folder."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from mm_moe.batch import IMAGE, TEXT
from mm_moe.errors import ConfigError
from mm_moe.moe.settings import MoESettings
from mm_moe.registry import BACKBONES, PROMPTS


@strict
class MultimodalMoEConfig(PreTrainedConfig):
    """Backbone, sparse layers, prompts and head of one model.

    Attributes:
        backbone: name in the registry of backbones, or `pkg.mod:Class`.
        backbone_config: the backbone's settings; empty means its defaults, or those of the
            pretrained weights.
        modalities: the model's modalities in their fixed order.
        moe: fields of `MoESettings`, or None for a dense model.
        moe_layers: blocks whose feed-forward is sparse: one list for every tower, or modality ->
            list. None means every second block (1, 3, 5, ...). Negative counts from the last.
        upcycle_noise: noise on each expert's copy of the dense weights, relative to their spread.
        prompt: name in the registry of prompts, or `pkg.mod:Class`.
        prompt_config: the prompt's options.
        label_names: names of the classes; sets `num_labels`, `id2label` and `label2id`.
        feature_norm: bring each feature to mean 0 and variance 1 before the head, which then learns
            at one rate whatever the scale of the tower's projection. (Features of length 1 trained
            worse: a loss of 1.5 against 0.5 after 150 steps of the small CLIP from scratch.)

    `num_labels` is 0 for a model without a head, which has a `logit_scale` instead (contrastive
    pretraining).
    """

    model_type = "mm_moe"

    backbone: str = "small_clip"
    backbone_config: dict[str, Any] = field(default_factory=dict)
    modalities: list[str] | tuple[str, ...] = (IMAGE, TEXT)
    moe: dict[str, Any] | None = None
    moe_layers: list[int] | dict[str, list[int]] | None = None
    upcycle_noise: float = 0.0
    prompt: str = "none"
    prompt_config: dict[str, Any] = field(default_factory=dict)
    label_names: list[str] | tuple[str, ...] | None = None
    feature_norm: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        """Check names and numbers; sort the labels out.

        Raises:
            ConfigError: an unknown backbone or prompt, wrong sparse settings, or label names whose
                number is not `num_labels`.
        """
        BACKBONES.check(self.backbone)
        PROMPTS.check(self.prompt)
        if self.moe is not None:
            self.moe = MoESettings.from_dict(self.moe).asdict()
        self.modalities = list(self.modalities)
        if self.label_names is not None:
            self.label_names = list(self.label_names)
            count = len(self.label_names)
            if kwargs.get("num_labels", count) != count:
                raise ConfigError(
                    f"num_labels ({kwargs['num_labels']}) is not the number of label_names "
                    f"({count}); leave num_labels out."
                )
            self.id2label = dict(enumerate(self.label_names))
            self.label2id = {name: index for index, name in self.id2label.items()}
        super().__post_init__(**kwargs)

    def sparse_blocks(self, modality: str, num_blocks: int) -> list[int]:
        """Which blocks of a tower get a sparse feed-forward, in order.

        Raises:
            ConfigError: an index that the tower does not have.
        """
        if self.moe is None:
            return []
        chosen = self.moe_layers
        if isinstance(chosen, dict):
            for name in chosen:
                if name not in self.modalities:
                    raise ConfigError(
                        f"moe_layers names {name!r}, the model has {', '.join(self.modalities)}."
                    )
            chosen = chosen.get(modality, [])
        if chosen is None:
            return list(range(1, num_blocks, 2))
        for index in chosen:
            if not -num_blocks <= index < num_blocks:
                raise ConfigError(
                    f"moe_layers asks for block {index} of the {modality} tower, which has "
                    f"{num_blocks} blocks (0 to {num_blocks - 1})."
                )
        return sorted({index % num_blocks for index in chosen})
