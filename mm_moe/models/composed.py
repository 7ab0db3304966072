"""A model of several ordinary models, each over some of the modalities.

With members for single modalities and one for all of them, and `combine` "product", this is I2M2
(Madaan et al. 2024): intra- and inter-modality dependencies as factors of one distribution.

Axes: B samples, M modalities, N packed rows of one modality, K members, C outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mm_moe.backbones.base import Payload
from mm_moe.models.combine import PRODUCT, members_in_use, mixture_of_experts, product_of_experts
from mm_moe.models.composed_configuration import GATE, ComposedConfig
from mm_moe.models.loading import load_whole
from mm_moe.models.modeling import MultimodalMoEModel
from mm_moe.models.output import MultimodalMoEOutput, mean_router_losses
from mm_moe.models.rows import packed_rows
from mm_moe.moe.layer import MoELayer, RoutingRecord
from prompts.base import Prompt


class ComposedModel(PreTrainedModel):
    """Members, run one after the other on the samples that they speak for, and combined.

    Every process runs every member in the same order; one whose batch has no sample for a member
    runs its blank rows.

    Args:
        config: what the members are.
        members: name -> a finished model, such as one that was trained before; the others are new.
    """

    config: ComposedConfig
    config_class = ComposedConfig
    main_input_name = "present"
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    def __init__(
        self,
        config: ComposedConfig,
        *,
        members: Mapping[str, MultimodalMoEModel] | None = None,
    ) -> None:
        super().__init__(config)
        self.modalities = tuple(config.modalities)
        built = dict(members or {})
        for name in config.members:
            if name not in built:
                built[name] = MultimodalMoEModel(config.member_config(name))
            config.members[name] = built[name].config.to_dict()  # what the backbone completed
        self.members = nn.ModuleDict({name: built[name] for name in config.members})
        self.names = tuple(config.experts)
        self.freeze()
        self.post_init()

    def member(self, name: str) -> MultimodalMoEModel:
        """One member."""
        return self.members[name]  # type: ignore[return-value]

    def forward(
        self,
        present: Tensor,
        inputs: Mapping[str, Payload],
        labels: Tensor | None = None,
        ids: list[str] | None = None,
        interaction: Tensor | None = None,
    ) -> MultimodalMoEOutput:
        """Combined logits; names of features and routing start with "<member>:".

        Args:
            present: bool (B, M).
            inputs: modality -> its packed payload, one row per present sample, in order.
            labels: not used here; accepted so that a batch is a call.
            ids: likewise.
            interaction: see `MultimodalMoEModel.forward`.

        Raises:
            DataError: a payload whose rows are not the samples that have the modality.
        """
        packed_rows(present, inputs, self.modalities)
        places = [self._places(name) for name in self.names]
        use_BK = members_in_use(present, places)
        outputs = [
            self._run(name, use_BK[:, k], present, inputs, interaction)
            for k, name in enumerate(self.names)
        ]
        logits_BKC = torch.stack([_logits(output) for output in outputs], dim=1)
        if self.config.combine == PRODUCT:
            logits_BC = product_of_experts(logits_BKC, use_BK)
        else:
            gate_BK = logits_BKC.new_zeros(use_BK.shape)
            if GATE in self.members:
                everyone_B = use_BK.any(1)
                outputs.append(self._run(GATE, everyone_B, present, inputs, interaction))
                gate_BK = _logits(outputs[-1])
            logits_BC = mixture_of_experts(logits_BKC, use_BK, gate_BK, self.config.problem_type)
        ran = [*self.names, *([GATE] if GATE in self.members else [])]
        return _joined(logits_BC, dict(zip(ran, outputs, strict=True)))

    def _places(self, name: str) -> list[int]:
        """Indices of a member's modalities."""
        return [self.modalities.index(modality) for modality in self.member(name).modalities]

    def _run(
        self,
        name: str,
        use_B: Tensor,
        present_BM: Tensor,
        inputs: Mapping[str, Payload],
        interaction: Tensor | None,
    ) -> MultimodalMoEOutput:
        """A member's output (B rows); only the samples it is used for reach its towers."""
        columns = self._places(name)
        taken: dict[str, Payload] = {}
        for m in columns:
            keep_N = use_B[present_BM[:, m]]
            if keep_N.any():
                payload = inputs[self.modalities[m]]
                whole = bool(keep_N.all())
                taken[self.modalities[m]] = (
                    payload if whole else {key: value[keep_N] for key, value in payload.items()}
                )
        own_BM = present_BM[:, columns] & use_B[:, None]
        return self.member(name)(own_BM, taken, interaction=interaction)

    def train(self, mode: bool = True) -> ComposedModel:
        """As of any module, but frozen members stay as in evaluation: so do their statistics."""
        super().train(mode)
        for name in self.config.frozen:
            self.members[name].eval()
        return self

    def freeze(
        self, lock: Iterable[str] = (), *, experts: bool = False, unlock_blocks: int = 0
    ) -> None:
        """Stop the training of whole members (`config.frozen`) and of towers' dense weights.

        Args:
            lock: modalities whose towers are frozen in every member that has them.
            experts: see `MultimodalMoEModel.freeze`.
            unlock_blocks: likewise.
        """
        for name in self.members:
            member = self.member(name)
            own = [modality for modality in lock if modality in member.modalities]
            member.freeze(own, experts=experts, unlock_blocks=unlock_blocks)
        for name in self.config.frozen:
            self.members[name].requires_grad_(False)

    def sparse_layers(self) -> dict[str, MoELayer]:
        """The sparse layers by the names of their routing records."""
        return {
            f"{name}:{place}": layer
            for name in self.members
            for place, layer in self.member(name).sparse_layers().items()
        }

    def trainable_report(self) -> list[tuple[str, int]]:
        """(group, number of trainable values) for each group of each member, 0 where frozen."""
        return [
            (f"{name}:{group}", count)
            for name in self.members
            for group, count in self.member(name).trainable_report()
        ]

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """The members' prompts."""
        return tuple(self.member(name).prompt for name in self.members)

    def initialise_prompt(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Start every member's prompt from the task's data."""
        kept = list(batches)
        for name in self.members:
            own = self.member(name).modalities
            self.member(name).initialise_prompt(
                {**batch, "inputs": {m: p for m, p in batch["inputs"].items() if m in own}}
                for batch in kept
            )

    def merge_lora(self) -> None:
        """Turn every member's adapters into plain weights."""
        for name in self.members:
            self.member(name).merge_lora()
            self.config.members[name] = self.member(name).config.to_dict()

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Any = None,
        every_n_layers: int = 1,
    ) -> None:
        for name in self.members:
            self.member(name)._set_gradient_checkpointing(
                enable, gradient_checkpointing_func, every_n_layers
            )

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether blocks are computed again in the backward pass."""
        return any(self.member(name).is_activation_checkpointing for name in self.members)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: a checkpoint of this model is whole, and members draw their own weights."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in the library, but weights that are missing or do not fit are an error.

        Raises:
            CheckpointError: names the first tensor.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = load_whole(super().from_pretrained, args, kwargs)
        for prompt in model.prompts:
            prompt.freeze_fixed()
        model.freeze()
        return (model, info) if wants_info else model


def _logits(output: MultimodalMoEOutput) -> Tensor:
    assert output.logits is not None, "the configuration gives every member outputs"
    return output.logits


def _joined(logits_BC: Tensor, outputs: Mapping[str, MultimodalMoEOutput]) -> MultimodalMoEOutput:
    """One output; router losses are means over the sparse layers of all members."""
    features: dict[str, Tensor] = {}
    routing: dict[str, RoutingRecord] = {}
    losses: dict[str, Tensor] = {}
    for name, output in outputs.items():
        features |= {f"{name}:{place}": value for place, value in output.features.items()}
        routing |= {f"{name}:{place}": record for place, record in output.routing.items()}
        for key, loss in output.losses.items():
            if not any(key in record.losses for record in output.routing.values()):
                losses[key] = losses.get(key, 0.0) + loss / len(outputs)  # of a prompt
    return MultimodalMoEOutput(
        logits=logits_BC,
        features=features,
        losses=mean_router_losses(routing) | losses,
        routing=routing,
    )
