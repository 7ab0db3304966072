"""What a model is made of, as the `config.json` of a Hugging Face folder."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from mm_moe.batch import IMAGE, TEXT
from mm_moe.errors import ConfigError
from mm_moe.models.adapters import LoraSettings
from mm_moe.models.fusion import TRANSFORMER, FusionSettings
from mm_moe.models.interaction_settings import InteractionSettings
from mm_moe.moe.settings import MoESettings
from mm_moe.registry import BACKBONES, FILLS, PROMPTS, nearest

LOGIT_SCALE = 2.6592  # log(1 / 0.07), CLIP's
MOE_MODES = ("sparse", "dense", "first_half", "second_half")


def expert_settings(moe: dict[str, Any]) -> list[MoESettings]:
    """The settings of the sparse layers: one for all, or one for each in order (a pyramid).

    Args:
        moe: fields of `MoESettings`; `num_experts` may be a list, one number for each sparse block
            of a tower (Rajbhandari et al. 2022, Pyramid-MoE).

    Raises:
        ConfigError: a value that cannot work in some layer, such as more choices than experts.
    """
    counts = moe.get("num_experts")
    if not isinstance(counts, (list, tuple)):
        return [MoESettings.from_dict(moe)]
    if not counts:
        raise ConfigError("moe.num_experts is an empty list; give one number, or one per block.")
    return [MoESettings.from_dict({**moe, "num_experts": count}) for count in counts]


@strict
class MultimodalMoEConfig(PreTrainedConfig):
    """Backbone, sparse layers, prompts and head of one model.

    Attributes:
        backbone: name in the registry of backbones, or `pkg.mod:Class`.
        backbone_config: the backbone's settings; empty means its defaults, or those of the
            pretrained weights.
        modalities: the model's modalities in their fixed order.
        moe: fields of `MoESettings`, or None for a dense model. `num_experts` may be a list: one
            number for each sparse block of a tower, in order, the same for every tower.
        moe_layers: blocks whose feed-forward is sparse: one list for every tower, or modality ->
            list. Negative counts from the last. None leaves the choice to `moe_mode`.
        moe_mode: "sparse" (every `moe_every`-th block), "dense" (all), "first_half" or
            "second_half" of n blocks (range(0, n // 2), range(n // 2, n)). The names are those of
            MoE-LLaVA, whose sparse blocks are 0, 2, 4, ...; ours are 1, 3, 5, ...
        moe_every: N of the mode "sparse": blocks N - 1, 2N - 1, ...
        upcycle_noise: noise on each expert's copy of the dense weights, relative to their spread.
        upcycle_drop: share of the hidden units that each expert draws anew.
        lora: fields of `LoraSettings`, or None for no adapters.
        prompt: name in the registry of prompts, or `pkg.mod:Class`.
        prompt_config: the prompt's options.
        fill: name in the registry of fills, or `pkg.mod:Class`: what stands in for the features of
            missing modalities before the head. None: zeros, which fusion may tell from features.
        fill_config: the fill's options.
        label_names: names of the classes; sets `num_labels`, `id2label` and `label2id`.
        pad_text: token id that fills every text up to the longest that the text tower takes, or
            None: texts are padded to the longest of their batch. Only prompts that attend to
            padding see a difference.
        feature_norm: bring each feature to mean 0 and variance 1 before the head, which then learns
            at one rate whatever the scale of the tower's projection. (Features of length 1 trained
            worse: a loss of 1.5 against 0.5 after 150 steps of the small CLIP from scratch.)
        fusion: "concat" (features side by side), "low_rank" (low-rank tensor fusion) or
            "transformer" (attention among all tokens).
        fusion_options: fields of `TransformerSettings`, for the transformer (`--fusion_config`; a
            config's `fusion_config` belongs to transformers, which means another thing by it).
        fusion_rank: factors of the low-rank tensor.
        fusion_size: width of what the low-rank tensor gives.
        head_hidden_size: width of a hidden layer (ReLU) in the head; 0: one linear layer.
        interaction_experts: fields of `InteractionSettings` for a head of interaction experts, or
            None for a head that is one classifier.
        logit_scale_init: start of `logit_scale`, the logarithm of a contrastive inverse
            temperature.
        logit_bias_init: start of `logit_bias`, which a sigmoid loss needs; None: no bias.

    `num_labels` is 0 for a model without a head, which has a `logit_scale` and may have a
    `logit_bias` instead (contrastive pretraining).
    """

    model_type = "mm_moe"

    backbone: str = "small_clip"
    backbone_config: dict[str, Any] = field(default_factory=dict)
    modalities: list[str] | tuple[str, ...] = (IMAGE, TEXT)
    moe: dict[str, Any] | None = None
    moe_layers: list[int] | dict[str, list[int]] | None = None
    moe_mode: str = "sparse"
    moe_every: int = 2
    upcycle_noise: float = 0.0
    upcycle_drop: float = 0.0
    lora: dict[str, Any] | None = None
    prompt: str = "none"
    prompt_config: dict[str, Any] = field(default_factory=dict)
    fill: str | None = None
    fill_config: dict[str, Any] = field(default_factory=dict)
    label_names: list[str] | tuple[str, ...] | None = None
    pad_text: int | None = None
    feature_norm: bool = True
    fusion: str = "concat"
    fusion_options: dict[str, Any] = field(default_factory=dict)
    fusion_rank: int = 40
    fusion_size: int = 120
    head_hidden_size: int = 0
    interaction_experts: dict[str, Any] | None = None
    logit_scale_init: float = LOGIT_SCALE
    logit_bias_init: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        """Check names and numbers; sort the labels out.

        Raises:
            ConfigError: an unknown backbone or prompt, wrong sparse settings, or label names whose
                number is not `num_labels`.
        """
        BACKBONES.check(self.backbone)
        PROMPTS.check(self.prompt)
        if self.fill is not None:
            FILLS.check(self.fill)
        elif self.fill_config:
            raise ConfigError(f"fill_config ({self.fill_config}) without a fill; name one.")
        self._check_sparse()
        self.fusion_settings  # noqa: B018 (checks the numbers)
        if self.interaction_settings is not None:
            self.interaction_experts = self.interaction_settings.asdict()
        if self.lora is not None:
            self.lora = LoraSettings.from_dict(self.lora).asdict()
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

    @property
    def interaction_settings(self) -> InteractionSettings | None:
        """The interaction experts, if the model has any."""
        if self.interaction_experts is None:
            return None
        if self.head_hidden_size:
            raise ConfigError(
                f"head_hidden_size ({self.head_hidden_size}) is for a head that is one classifier; "
                "interaction experts have a hidden layer each. Set it to 0."
            )
        if self.fusion == TRANSFORMER:
            raise ConfigError(
                "fusion 'transformer' has a classifier of its own, and so have interaction "
                "experts; take fusion concat or low_rank with them."
            )
        return InteractionSettings.from_dict(self.interaction_experts)

    @property
    def fusion_settings(self) -> FusionSettings:
        """How features become logits."""
        return FusionSettings(
            self.fusion,
            self.fusion_rank,
            self.fusion_size,
            self.head_hidden_size,
            self.fusion_options,
        )

    def _check_sparse(self) -> None:
        """Check what concerns the experts and complete `moe` with its defaults."""
        if self.moe_mode not in MOE_MODES:
            raise ConfigError(
                f"unknown moe_mode {self.moe_mode!r}; {nearest(self.moe_mode, list(MOE_MODES))}"
            )
        if self.moe_every < 1:
            raise ConfigError(f"moe_every ({self.moe_every}) must be at least 1.")
        if not 0 <= self.upcycle_noise < float("inf"):
            raise ConfigError(f"upcycle_noise ({self.upcycle_noise}) must be finite, at least 0.")
        if not 0 <= self.upcycle_drop <= 1:
            raise ConfigError(
                f"upcycle_drop ({self.upcycle_drop}) must lie in [0, 1]: the share of hidden units "
                "that each expert draws anew."
            )
        if self.moe is not None:
            each = expert_settings(self.moe)
            counts = [settings.num_experts for settings in each]
            self.moe = {**each[0].asdict(), "num_experts": counts if counts[1:] else counts[0]}

    def sparse_settings(self, modality: str, num_blocks: int) -> dict[int, MoESettings]:
        """Block -> settings of its sparse layer, for one tower, in order.

        Raises:
            ConfigError: an index that the tower does not have, or numbers of experts that are not
                one for each sparse block.
        """
        blocks = self.sparse_blocks(modality, num_blocks)
        if not blocks:
            return {}
        count = len(self.modalities)  # what only the model knows
        each = expert_settings(self.moe or {})
        known: dict[str, Any] = {"num_modalities": count, "modalities": list(self.modalities)}
        each = [dataclasses.replace(settings, **known) for settings in each]
        if len(each) == 1:
            return dict.fromkeys(blocks, each[0])
        if len(each) != len(blocks):
            counts = " ".join(str(settings.num_experts) for settings in each)
            raise ConfigError(
                f"num_experts has {len(each)} numbers ({counts}), the {modality} tower has "
                f"{len(blocks)} sparse blocks ({', '.join(map(str, blocks))}); give one number for "
                f"all, or {len(blocks)}."
            )
        return dict(zip(blocks, each, strict=True))

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
            return list(self._blocks_of_mode(num_blocks))
        for index in chosen:
            if not -num_blocks <= index < num_blocks:
                raise ConfigError(
                    f"moe_layers asks for block {index} of the {modality} tower, which has "
                    f"{num_blocks} blocks (0 to {num_blocks - 1})."
                )
        return sorted({index % num_blocks for index in chosen})

    def _blocks_of_mode(self, num_blocks: int) -> range:
        if self.moe_mode == "first_half":
            return range(num_blocks // 2)
        if self.moe_mode == "second_half":
            return range(num_blocks // 2, num_blocks)
        every = 1 if self.moe_mode == "dense" else self.moe_every
        return range(every - 1, num_blocks, every)
