"""The model: backbone + prompts + sparse feed-forwards + head, as a `PreTrainedModel`.

Axes: B samples, M modalities, N packed rows of one modality, D width of a feature, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from mm_moe.backbones.base import Backbone, Payload, Tower
from mm_moe.backbones.entrance import Generated
from mm_moe.errors import ConfigError
from mm_moe.fill.base import Fill, Filled
from mm_moe.models.adapters import LoraSettings, add_lora, merge_lora
from mm_moe.models.configuration import MultimodalMoEConfig
from mm_moe.models.fill_start import new_fill
from mm_moe.models.fusion import Head, TransformerHead, new_head
from mm_moe.models.generation import check_generates, generated_rows, generated_tokens
from mm_moe.models.interaction_head import LAYER_NAME, InteractionHead
from mm_moe.models.loading import check_loaded
from mm_moe.models.output import MultimodalMoEOutput, mean_router_losses
from mm_moe.models.prompt_start import anchors, first_tokens, new_prompt
from mm_moe.models.rows import packed_rows, prompt_rows, token_contexts
from mm_moe.models.supports import Supports, WideBatch
from mm_moe.models.trainable import freeze_tower, trainable_counts
from mm_moe.moe.context import TokenContext
from mm_moe.moe.layer import MoELayer, RoutingRecord
from mm_moe.moe.upcycle import upcycle
from mm_moe.registry import BACKBONES
from prompts.base import Prompt

OPTIONAL_ON_LOAD = ("head.", "prompt.", "logit_")  # may be new when a checkpoint is taken over


class MultimodalMoEModel(PreTrainedModel):
    """A sparse multimodal model for any pattern of present modalities.

    Every tower runs only on the rows that have its modality. In a batch without any, it runs one
    blank row whose feature enters with weight 0: the same graph on every process.

    Args:
        config: what the model is made of.
        backbone: a dense backbone to build on, such as a pretrained one; a new random one if None.
            Sparse layers start as copies of its feed-forwards.
    """

    config: MultimodalMoEConfig
    config_class = MultimodalMoEConfig
    main_input_name = "present"
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    backbone: Backbone
    prompt: Prompt
    fill: Fill | None

    def __init__(self, config: MultimodalMoEConfig, *, backbone: Backbone | None = None) -> None:
        super().__init__(config)
        modalities = tuple(config.modalities)
        if backbone is None:
            backbone_class = BACKBONES.resolve(config.backbone)
            backbone = backbone_class(config.backbone_config, modalities=modalities)
        self.modalities = modalities
        self.backbone = backbone
        self._make_sparse()
        if config.lora is not None:
            add_lora(backbone, LoraSettings.from_dict(config.lora))
        self.prompt = new_prompt(config, dict(self._towers()))
        check_generates(self.prompt, backbone)
        self.anchor_prompt()
        self.fill = new_fill(config.fill, config.fill_config, backbone)
        if self.fill is not None and self.prompt.generates:
            raise ConfigError(
                f"prompt {config.prompt!r} generates tokens for what samples lack, and fill "
                f"{config.fill!r} makes others; take one of them."
            )
        self.head = self._new_head(config.num_labels) if config.num_labels else None
        self.logit_scale: nn.Parameter | None = None
        self.logit_bias: nn.Parameter | None = None
        if self.head is None:
            # one element, not a scalar: DeepSpeed cannot broadcast tensors without dimensions
            self.logit_scale = nn.Parameter(torch.tensor([config.logit_scale_init]))
            if config.logit_bias_init is not None:
                self.logit_bias = nn.Parameter(torch.tensor([config.logit_bias_init]))
        self._finish()

    def _make_sparse(self) -> None:
        """Turn the chosen blocks' dense feed-forwards into sparse layers."""
        for name, tower in self._towers():
            places = tower.feed_forwards()
            for block, settings in self.config.sparse_settings(name, tower.num_blocks).items():
                parent, attribute = places[block]
                dense = getattr(parent, attribute)
                if isinstance(dense, MoELayer):
                    continue  # a backbone that was taken over with its experts
                on_meta = next(dense.parameters()).is_meta
                sparse = upcycle(
                    dense,
                    settings=settings,
                    noise=0.0 if on_meta else self.config.upcycle_noise,
                    drop=0.0 if on_meta else self.config.upcycle_drop,
                )
                setattr(parent, attribute, sparse)

    def _new_head(self, num_outputs: int) -> Head | InteractionHead:
        config = self.config
        widths = [self.backbone.feature_width(name) for name in self.modalities]
        if config.interaction_settings is None:
            return new_head(
                widths,
                num_outputs,
                config.fusion_settings,
                num_tokens=self.backbone.num_tokens,
                modalities=self.modalities,
            )
        return InteractionHead(
            widths,
            num_outputs,
            modalities=self.modalities,
            problem_type=config.problem_type,
            settings=config.interaction_settings,
            fusion=config.fusion_settings,
        )

    def _finish(self) -> None:
        """Let the library do its book-keeping, but not draw the weights again."""
        if not next(self.parameters()).is_meta:
            for module in self.modules():
                module._is_hf_initialized = True  # type: ignore[assignment]
        self.post_init()

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Any = None,
        every_n_layers: int = 1,
    ) -> None:
        """What the library calls for `--activation_checkpointing`: our towers run the blocks.

        Its function is not used: ours makes every rank's second pass complete (see `recomputed`).
        """
        self.backbone.set_recompute(every_n_layers if enable else 0)

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether blocks are computed again in the backward pass."""
        return self.backbone.recompute_every > 0

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Draw weights that a checkpoint did not hold: of the head, the logit scale, the prompt.

        The library calls this for every module while it skips, inside `torch.nn.init`, the
        parameters that were loaded.
        """
        if module is self.head:
            self.head.draw()
        elif module is self and self.logit_scale is not None:
            nn.init.constant_(self.logit_scale, self.config.logit_scale_init)
            if self.logit_bias is not None:
                nn.init.constant_(self.logit_bias, self.config.logit_bias_init or 0.0)
        elif any(module is part for part in self.prompt.modules()):
            reset = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in the library, but weights that are missing or do not fit are an error.

        A new head, logit scale or prompt is fine: that is how a checkpoint is taken over.

        Raises:
            CheckpointError: the checkpoint lacks weights of the backbone, or has one of another
                shape (`ignore_mismatched_sizes=True` draws that one anew).
        """
        wants_info = kwargs.pop("output_loading_info", False)
        may_differ = kwargs.pop("ignore_mismatched_sizes", False)
        loaded: Any = super().from_pretrained(
            *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        model, info = loaded
        source = str(args[0] if args else kwargs.get("pretrained_model_name_or_path"))
        check_loaded(source, info, optional=OPTIONAL_ON_LOAD, may_differ=may_differ)
        model.prompt.freeze_fixed()
        new = {name for name in info["missing_keys"] if name.startswith("prompt.")}
        if new and len(new) == len(model.prompt.state_dict()):
            model.anchor_prompt()
        return (model, info) if wants_info else model

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """The prompt, as the one of every part of the model."""
        return (self.prompt,)

    def sparse_layers(self) -> dict[str, MoELayer]:
        """The sparse layers by the names of their routing records."""
        own = self.head.sparse_layers() if isinstance(self.head, TransformerHead) else {}
        own |= {} if self.fill is None else self.fill.sparse_layers()
        return self.backbone.sparse_layers() | own

    def _towers(self) -> list[tuple[str, Tower]]:
        return [(name, self.backbone.towers[name]) for name in self.modalities]  # type: ignore[misc]

    def forward(
        self,
        present: Tensor,
        inputs: Mapping[str, Payload],
        labels: Tensor | None = None,
        ids: list[str] | None = None,
        interaction: Tensor | None = None,
        run: Callable[[MultimodalMoEModel], MultimodalMoEOutput] | None = None,
        supports: Supports | None = None,
    ) -> MultimodalMoEOutput:
        """Encode what is present.

        Args:
            present: bool (B, M).
            inputs: modality -> its packed payload, one row per present sample, in order.
            labels: not used here (an objective reads them); accepted so that a batch is a call.
            ids: likewise.
            interaction: int64 (B,), type of the interaction between a sample's modalities, for the
                router `by_interaction`.
            run: what to do with this model instead, for an objective of several passes: all of
                them are then one forward pass of whatever is wrapped around the model.
            supports: modality -> training rows that have it, for a fill that needs them (see
                `Batch`).

        Raises:
            DataError: a payload whose rows are not the samples that have the modality,
                interactions that are not one per sample, or supports that do not fit the batch.
        """
        if run is not None:
            return run(self)
        rows = self._packed_rows(present, inputs)
        generated = generated_tokens(self.prompt, self.backbone, present, inputs)
        lacking = generated_rows(generated, self.modalities, present)
        if self.fill is None or not self.fill.needs_supports:
            supports = None
        wide = WideBatch.of(present, rows, inputs, interaction=interaction, supports=supports)
        contexts = token_contexts(wide.present_WM, wide.interaction_W, wide.rows, lacking)
        edits = self.prompt.start(*prompt_rows(wide.present_WM, wide.rows, lacking))
        features, routing = self._encoded(wide, edits, contexts, generated, lacking)
        filled = None
        if self.fill is not None:
            features, filled = self._filled(self.fill, features, present, wide, supports)
        logits, fused = self._logits(features, present)
        routing |= fused
        losses = mean_router_losses(routing)
        if filled is not None:
            losses, routing = losses | filled.losses, routing | filled.routing
        said = None
        if isinstance(self.head, InteractionHead):
            said = self.head(self._parts(features))
            routing[LAYER_NAME], losses = said.record, losses | said.losses
        return MultimodalMoEOutput(
            logits=logits if said is None else said.mixed_BC,
            features=features,
            losses=losses | self.prompt.losses(),
            routing=routing,
            interaction=said,
        )

    def _encoded(
        self,
        wide: WideBatch,
        edits: Mapping[str, Any],
        contexts: Mapping[str, TokenContext],
        generated: Mapping[str, Generated],
        lacking: Mapping[str, Tensor],
    ) -> tuple[dict[str, Tensor], dict[str, RoutingRecord]]:
        """Features (W, D) of every modality, zero where it is missing, and the towers' records."""
        features: dict[str, Tensor] = {}
        routing: dict[str, RoutingRecord] = {}
        for name in self.modalities:
            rows_N = wide.rows[name]
            payload = wide.inputs[name] if len(rows_N) else None
            feature_ND, records = self.backbone.encode(
                name, payload, edits.get(name), contexts[name], generated.get(name)
            )
            blank = int(payload is None)
            used_N = torch.cat([rows_N, lacking[name]])
            zeros_BD = feature_ND.new_zeros(len(wide.present_WM), feature_ND.shape[-1])
            feature_BD = zeros_BD.index_copy(0, used_N, feature_ND[blank:])
            features[name] = feature_BD + 0 * feature_ND[:blank].sum()
            routing.update(records)
        return features, routing

    def _filled(
        self,
        fill: Fill,
        features: dict[str, Tensor],
        present_BM: Tensor,
        wide: WideBatch,
        supports: Supports | None,
    ) -> tuple[dict[str, Tensor], Filled]:
        """Features (B, D) with what the fill put in missing places, and what it says."""
        num_tokens, num_samples = self.backbone.num_tokens, len(present_BM)
        found = wide.tokens(features, supports, num_tokens=num_tokens)
        tokens = {
            name: feature[:num_samples].unflatten(-1, (num_tokens, -1))
            for name, feature in features.items()
        }
        filled = fill(tokens, present_BM, found)
        return {name: x_BPH.flatten(1) for name, x_BPH in filled.tokens.items()}, filled

    def _packed_rows(self, present_BM: Tensor, inputs: Mapping[str, Payload]) -> dict[str, Tensor]:
        """Positions (N,) of each modality's rows; a planned pass without values puts its own."""
        return packed_rows(present_BM, inputs, self.modalities)

    def _parts(self, features: dict[str, Tensor]) -> list[Tensor]:
        """What enters the head, in the order of the modalities."""
        parts = [features[name] for name in self.modalities]
        if self.config.feature_norm:  # a zero row stays zero
            parts = [F.layer_norm(part_BD, part_BD.shape[-1:]) for part_BD in parts]
        return parts

    def _logits(
        self, features: dict[str, Tensor], present_BM: Tensor
    ) -> tuple[Tensor | None, dict[str, RoutingRecord]]:
        """Logits (B, C) of a head that is one classifier, and the records of its sparse blocks."""
        if self.head is None or isinstance(self.head, InteractionHead):
            return None, {}
        parts = self._parts(features)
        if isinstance(self.head, TransformerHead):
            return self.head.fuse(parts, present_BM, filled=self.fill is not None)
        return self.head.fuse(parts), {}

    def freeze(
        self,
        lock: Iterable[str] = ("image", "text"),
        *,
        experts: bool = False,
        unlock_blocks: int = 0,
    ) -> None:
        """Stop the training of towers' dense weights.

        Routers, adapters, prompts, fills, projections to a common width and the head are never
        frozen.

        Args:
            lock: modalities whose towers are frozen.
            experts: freeze the experts in these towers too.
            unlock_blocks: the last so many blocks of these towers train all the same.

        Raises:
            ConfigError: a modality that the model does not have, or more blocks than a tower has.
        """
        for name in lock:
            if name not in self.modalities:
                raise ConfigError(
                    f"cannot lock {name!r}; the model has {', '.join(self.modalities)}."
                )
            tower: Tower = self.backbone.towers[name]  # type: ignore[assignment]
            freeze_tower(tower, experts=experts, unlock_blocks=unlock_blocks)

    def merge_lora(self) -> None:
        """Turn a model with adapters into the plain model that computes the same.

        For one process: call it before experts are spread, or on a model that was loaded.
        """
        if self.config.lora is not None:
            merge_lora(self.backbone)
            self.config.lora = None

    def trainable_report(self) -> list[tuple[str, int]]:
        """(group, number of trainable values) for each group of parameters, 0 where frozen."""
        return trainable_counts(self, self._towers())

    @torch.no_grad()
    def anchor_prompt(self) -> None:
        """Start the prompt from its towers; has to be repeated when their weights are replaced."""
        self.prompt.anchor(anchors(self.backbone))

    @torch.no_grad()
    def initialise_prompt(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Start the prompt from the task's data: the tokens that enter each tower's first block.

        Args:
            batches: a few training batches, the same on every process.
        """
        self.prompt.initialise(first_tokens(self.backbone, batches))
