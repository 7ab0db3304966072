"""What `launch/plan.py` works out: one run's needs from its settings, without a machine."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, replace
from typing import Any

import torch

from launch.assemble import learning_rate_scale
from launch.check_objective import plain_objective
from launch.cli import Settings
from launch.fill_flags import fill_exchange
from launch.fusion_experts import fusion_exchange, plan_fusion
from launch.plan_fill import FillPlan, plan_bytes
from launch.plan_model import hidden_of, meta_model, shard, weightless_config
from launch.scoring import num_outputs
from mm_moe.backbones.base import Tower
from mm_moe.batch import TEXT, base_modality
from mm_moe.data.missing import MissingProtocol
from mm_moe.data.schema import DataSource
from mm_moe.errors import ConfigError
from mm_moe.models.interaction_head import InteractionHead
from mm_moe.models.modeling import MultimodalMoEModel
from mm_moe.moe.layer import MoELayer
from mm_moe.registry import BACKBONES
from mm_moe.training import exchange
from mm_moe.training.estimate import (
    Memory,
    ParameterCount,
    build_bytes,
    count_parameters,
    largest_micro_batch,
    peak_memory,
    rows_of,
)
from mm_moe.training.planned import Workload
from mm_moe.training.timeline import Timeline, record_timeline
from mm_moe.training.zero_memory import Group, Overlay, ZeroSettings, optimizer_groups, overlay
from pretrain.contrastive import Contrastive

CPU = "cpu"
GIB = 1 << 30
DRAWS = 10_000  # samples from which the shares of missing modalities are counted
PLAIN_ROUTER = "topk_softmax"
PLANNED_ROUTERS = (PLAIN_ROUTER, "topk_sigmoid")  # what they choose does not change any shape
STAGES = ("ZeRO-0", "ZeRO-1", "ZeRO-2", "ZeRO-2 + offload")


@dataclass(frozen=True)
class Machine:
    """What the run is planned for.

    Attributes:
        world_size: processes, one per GPU.
        gpus_per_node: of them on one node.
        gpu: a name in `exchange.GPUS`, or "cpu" for training on hosts.
        memory: usable bytes of one GPU (or of one process' share of a host).
        links: how fast a process sends.
        imbalance: rows of the fullest process relative to the mean.
    """

    world_size: int
    gpus_per_node: int
    gpu: str
    memory: int
    links: exchange.Links
    imbalance: float

    @property
    def is_cpu(self) -> bool:
        """Whether it has no GPU."""
        return self.gpu == CPU


@dataclass(frozen=True)
class Texts:
    """Tokens of a text: padded length, and how many of them are real on average."""

    padded: int
    real: float


class Planner:
    """Works out memory, exchange and time of one run.

    Args:
        settings: of the run; `moe.ep_size` is settled.
        source: the data set.
        machine: where it shall run.
        deepspeed: the checked DeepSpeed settings.
        text_tokens: padded length of a text; 0 takes the longest that the model has room for.
        real_text_tokens: mean real tokens of a text; 0 takes the padded length.
    """

    def __init__(
        self,
        settings: Settings,
        source: DataSource,
        *,
        machine: Machine,
        deepspeed: dict[str, Any],
        text_tokens: int = 0,
        real_text_tokens: float = 0.0,
    ) -> None:
        self.settings, self.source, self.machine = settings, source, machine
        self.deepspeed = deepspeed
        self.config = weightless_config(settings, source)
        self.model = meta_model(settings, self.config)
        self.ep_size = settings.moe.ep_size if settings.moe.moe_enable else 1
        self.half = bool(settings.training.bf16)
        self.needs = BACKBONES.resolve(self.config.backbone).processor_needs(
            self.model.config.backbone_config
        )
        padded = self._padded(text_tokens)
        self.texts = Texts(padded, min(real_text_tokens or padded, padded))
        self.counts: dict[str, ParameterCount] = count_parameters(self.model)
        self.notes: list[str] = []
        self.stand_in = self._stand_in()

    def _padded(self, wanted: int) -> int:
        room = self.needs.max_text_tokens
        if room and TEXT in self.config.modalities and wanted > room:
            raise ConfigError(
                f"--text_tokens ({wanted}) cannot exceed the {room} positions of the text tower."
            )
        return wanted or room

    def _stand_in(self) -> MultimodalMoEModel:
        """The model whose passes are recorded: values that nobody has must not shape tensors."""
        moe = self.config.moe or {}
        plain = dict(moe)
        if moe and moe["router"] not in PLANNED_ROUTERS:
            plain["router"] = PLAIN_ROUTER
            self.notes.append(f"activations of router {moe['router']!r} as of {PLAIN_ROUTER!r}")
        if moe and self.settings.moe.moe_backend != "ours":
            self.notes.append(f"layers of backend {self.settings.moe.moe_backend!r} as of 'ours'")
        if moe.get("drop_tokens"):
            plain["drop_tokens"] = False
            self.notes.append("activations and exchange as if no token were dropped")
        config = copy.deepcopy(self.config)
        if self.model.prompt.generates:
            config.prompt, config.prompt_config = "none", {}
            self.notes.append(f"activations without what prompt {self.config.prompt!r} generates")
        if config.fill is not None:
            config.fill, config.fill_config = None, {}  # see `fill_plan`
        plan_fusion(config, router=PLAIN_ROUTER, planned=PLANNED_ROUTERS, notes=self.notes)
        config.moe = plain or None
        if config.to_dict() == self.config.to_dict():
            return self.model
        return meta_model(self.settings, config)

    @functools.cached_property
    def present_DM(self) -> torch.Tensor:
        """What many samples have, drawn as training draws them."""
        kind, ratio = self.settings.data.missing_type, self.settings.data.missing_ratio
        protocol = MissingProtocol(dataset="", split="", kind=kind, ratio=ratio)
        return protocol.present([str(index) for index in range(DRAWS)], self.config.modalities)

    @functools.cached_property
    def missing(self) -> dict[str, float]:
        """Modality -> share of the samples that lack it."""
        lacking_M = 1 - self.present_DM.float().mean(0)
        return dict(zip(self.config.modalities, lacking_M.tolist(), strict=True))

    @property
    def missing_ratio(self) -> float:
        """Share of the samples that lack something."""
        data = self.settings.data
        return data.missing_ratio if data.missing_type != "none" else 0.0

    @functools.cached_property
    def workload(self) -> Workload:
        """One micro-batch."""
        on_cpu = self.machine.is_cpu
        return Workload(
            text_tokens=self.texts.padded,
            real_text_tokens=self.texts.real,
            image_size=self.needs.image_size,
            outputs=num_outputs(self.source) if self.config.num_labels else 0,
            problem_type=self.source.problem_type,
            sequences={
                name: (needs.length, needs.width) for name, needs in self.needs.sequences.items()
            },
            arrays={name: needs.shape for name, needs in self.needs.arrays.items()},
            ep_size=self.ep_size,
            imbalance=self.machine.imbalance,
            half=self.half,
            grouped=self.half and not on_cpu,
            keep_inputs=on_cpu,
        )

    @property
    def recompute_every(self) -> int:
        """Blocks of which the flags have one computed again; 0 for none."""
        training = self.settings.training
        if not training.activation_checkpointing:
            return 0
        options: Any = training.activation_checkpointing_kwargs or {}
        return int(options.get("every_n_layers", 1))

    def timeline(self, *, recompute_every: int) -> Timeline:
        """Bytes of activations through a micro-batch."""
        load = replace(self.workload, recompute_every=recompute_every)
        return record_timeline(
            lambda: shard(self.stand_in, ep_size=self.ep_size),
            plain_objective(self.settings, problem_type=self.source.problem_type),
            load=load,
        )

    @functools.cached_property
    def plain(self) -> Timeline:
        """As the flags say."""
        return self.timeline(recompute_every=self.recompute_every)

    def zero(self, stage: str) -> ZeroSettings:
        """The sharding of one of `STAGES`, with the buckets of the DeepSpeed file."""
        section = self.deepspeed.get("zero_optimization", {})
        bucket = section.get("reduce_bucket_size", ZeroSettings.reduce_bucket_size)
        return ZeroSettings(
            stage=STAGES.index(stage.split(" ")[0]),
            world_size=self.machine.world_size,
            ep_size=self.ep_size,
            half=self.half,
            offload=stage.endswith("offload"),
            reduce_bucket_size=int(bucket) if bucket != "auto" else ZeroSettings.reduce_bucket_size,
            overlap_comm=section.get("overlap_comm", False) is True,
            accumulation=self.settings.training.gradient_accumulation_steps,
            clips=self.settings.training.max_grad_norm > 0,
        )

    @property
    def own_stage(self) -> str:
        """The stage that the DeepSpeed file asks for."""
        section = self.deepspeed.get("zero_optimization", {})
        device = (section.get("offload_optimizer") or {}).get("device", "none")
        stage = f"ZeRO-{section.get('stage', 0)}"
        return f"{stage} + offload" if device != "none" else stage

    @property
    def stages(self) -> list[str]:
        """Stages that training accepts at this precision."""
        found = [stage for stage in STAGES if not (self.half and stage == "ZeRO-0")]
        return found if self.own_stage in found else [*found, self.own_stage]

    def groups(self, zero: ZeroSettings) -> list[Group]:
        """The optimizer's parameter groups on one process."""
        scale = learning_rate_scale(self.settings.run.new_parts_lr_scale)
        return optimizer_groups(shard(self.model, ep_size=zero.ep_size), zero=zero, scale=scale)

    def overlay(self, zero: ZeroSettings, timeline: Timeline | None = None) -> Overlay:
        """What the engine holds."""
        timeline = timeline or self.plain
        groups = self.groups(zero)
        local = shard(self.model, ep_size=zero.ep_size)
        frozen = sum(p.numel() for p in local.parameters() if not p.requires_grad)
        frozen += sum(b.numel() for b in local.buffers())
        return overlay(
            groups,
            zero=zero,
            frozen_bytes=frozen * zero.element,
            marks=timeline.marks,
            moments=timeline.live_QV.shape[1],
        )

    def rows(self, samples: int) -> dict[str, int]:
        """Rows of each modality in a micro-batch, those of supports too."""
        own = rows_of(samples, self.missing, ratio=self.missing_ratio)
        return self.fill_plan.rows(samples, own) if self.fill_plan else own

    @functools.cached_property
    def fill_plan(self) -> FillPlan | None:
        """What the model's fill adds."""
        rows = self.source.size(self.settings.data.train_split)
        build = functools.partial(shard, self.model, ep_size=self.ep_size)
        return FillPlan.of(build, self.present_DM, train_rows=rows, load=self.workload)

    def memory(self, samples: int, over: Overlay, timeline: Timeline | None = None) -> Memory:
        """Bytes of one process."""
        return peak_memory(
            timeline or self.plain,
            over,
            samples=samples,
            rows=self.rows(samples),
            extra=self._gathered(samples) + plan_bytes(self.fill_plan, samples),
        )

    def _gathered(self, samples: int) -> int:
        """Bytes of the contrastive loss over all processes' rows; whole logits grow as a square."""
        objective = self.contrastive
        if objective is None or objective.variant == "ring":
            return 0
        if self.settings.objective.grad_cache:
            samples *= self.settings.training.gradient_accumulation_steps
        everyone = samples * self.machine.world_size
        features = everyone * 2 * 4 * self.model.backbone.out_width  # float32, two modalities
        if objective.variant == "chunked":
            return 2 * features  # and their gradients
        # per direction a log-softmax and a gradient
        return features + everyone * samples * 2 * (4 + 4)

    @functools.cached_property
    def contrastive(self) -> Contrastive | None:
        """The objective, if it compares the samples of all processes."""
        objective = plain_objective(self.settings, problem_type="none")
        return objective if isinstance(objective, Contrastive) else None

    def needed(self, samples: int, over: Overlay) -> int:
        """Bytes that have to fit: of the device, or of device and host where they are one."""
        memory = self.memory(samples, over)
        return memory.device + (memory.host if self.machine.is_cpu else 0)

    def largest(self, over: Overlay) -> int:
        """The largest micro-batch that fits the machine."""
        return largest_micro_batch(
            lambda samples: self.needed(samples, over), available=self.machine.memory
        )

    def sparse_layers(self, samples: int) -> list[exchange.SparseLayer]:
        """What each sparse layer does with one micro-batch on average."""
        tokens, every = self._tokens(samples), self.recompute_every
        found = []
        for name in self.config.modalities:
            tower: Tower = self.model.backbone.towers[name]  # type: ignore[assignment]
            for block, (parent, attribute) in enumerate(tower.feed_forwards()):
                layer = getattr(parent, attribute)
                if isinstance(layer, MoELayer):
                    found.append(
                        exchange.SparseLayer(
                            tokens=tokens[name],
                            width=layer.width,
                            hidden=hidden_of(layer),
                            top_k=layer.settings.top_k,
                            recomputed=bool(every) and block % every == 0,
                        )
                    )
        found += fill_exchange(self.model.fill, missing=self.missing, samples=samples)
        head = self.model.head
        if isinstance(head, InteractionHead):
            rows, hidden = samples * len(head.kinds), hidden_of(head.layer)
            found.append(exchange.SparseLayer(rows, head.layer.width, hidden, 1, recomputed=False))
        present = sum(1 - share for share in self.missing.values())
        return found + fusion_exchange(head, modality_rows=samples * present)

    def _tokens(self, samples: int) -> dict[str, float]:
        """Mean real tokens of one micro-batch that reach a block, by modality."""
        found = {}
        for name in self.config.modalities:
            tower = self.model.backbone.towers[name]
            if self.model.backbone.num_tokens > 1:
                length: float = self.model.backbone.num_tokens
            elif name in self.needs.sequences:
                length = self.needs.sequences[name].length
            elif base_modality(name) == TEXT:
                length = self.texts.real
            else:
                with torch.device("meta"):
                    length = tower.embed(tower.blank())[0].shape[1]  # type: ignore[operator]
            found[name] = samples * (1 - self.missing[name]) * length
        return found

    def traffic(self, zero: ZeroSettings, samples: int) -> dict[str, exchange.Traffic]:
        """Bytes that one process sends in a step, by cause."""
        near = self.machine.gpus_per_node
        groups = self.groups(zero)
        found = {
            "expert all-to-all": exchange.expert_traffic(
                self.sparse_layers(samples),
                zero=zero,
                gpus_per_node=near,
                imbalance=self.machine.imbalance,
            ),
            **exchange.gradient_traffic(groups, zero=zero, gpus_per_node=near),
            "weights all-gather": exchange.weight_traffic(groups, zero=zero, gpus_per_node=near),
        }
        if self.contrastive is not None:
            size = samples * zero.world_size * self.model.backbone.out_width * 4.0
            one = exchange.all_reduce(
                size, ranks=zero.world_size, stride=1, gpus_per_node=near
            ).times(1.5 * len(self.config.modalities) * zero.accumulation)
            found["contrastive features"] = one
        return found

    def flops(self, samples: int) -> float:
        """Operations of one step on one process, forward and backward, recomputed ones too."""
        rows = {name: round(samples * (1 - share)) for name, share in self.missing.items()}
        return self.plain.flops(samples, rows) * self.settings.training.gradient_accumulation_steps

    def peak_rate(self) -> float:
        """FLOP/s of the GPU at this precision; 0 on a CPU."""
        if self.machine.is_cpu:
            return 0.0
        return exchange.GPUS[self.machine.gpu][0] * (1 if self.half else 0.5)

    @property
    def build_bytes(self) -> int:
        """Host bytes of a process while it builds the model."""
        return build_bytes(self.counts, ep_size=self.ep_size)
