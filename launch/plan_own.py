"""The plan of a run whose model is of its own kind: a cell or a mixture autoencoder.

S species, G genes of a species, W width of what an expert hands over.
"""

from __future__ import annotations

import copy
import functools
import math
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from launch.assemble import dense_model
from launch.check_objective import plain_objective
from launch.cli import Settings
from launch.own_models import own_config
from launch.plan_cells import record_cells
from launch.plan_model import shard
from launch.plan_record import Small, factors
from launch.planning import Machine, Planner, Texts
from mm_moe.batch import Batch
from mm_moe.cells.modeling import CellVAE
from mm_moe.data.cells.order import LONGEST, PROPORTIONAL, UNIFORM
from mm_moe.data.schema import DataSource
from mm_moe.data.sets.cells import CellsData
from mm_moe.data.unlabelled import Unlabelled
from mm_moe.errors import ConfigError
from mm_moe.models.mixture import MixtureVAE
from mm_moe.training import exchange
from mm_moe.training.estimate import DEVIATIONS, Memory, ParameterCount, peak_memory
from mm_moe.training.timeline import Timeline
from mm_moe.training.zero_memory import FLOAT32, Overlay, ZeroSettings
from pretrain.mmvae import CellObjective

SMALL_BATCHES = (8, 16, 24)  # of a mixture autoencoder
DRAWN = (UNIFORM, PROPORTIONAL)  # samplers whose turns are drawn
INDEX_BYTES = 8  # of a gene's place on its way to an expert


class OwnPlanner(Planner):
    """Works out memory, exchange and time of one run of a model of its own kind.

    Args:
        settings: of the run; `moe.ep_size` is settled.
        source: the data set.
        machine: where it shall run.
        deepspeed: the checked DeepSpeed settings.
        text_tokens: not used.
        real_text_tokens: not used.

    Raises:
        ConfigError: a model that the planner does not know.
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
        self.settings, self.machine, self.deepspeed = settings, machine, deepspeed
        self.source = source.source if isinstance(source, Unlabelled) else source
        config: Any = own_config(settings, source)
        self.config = config
        with torch.device("meta"):
            model: Any = dense_model(settings, copy.deepcopy(config))
        self.model = model
        if not isinstance(model, CellVAE | MixtureVAE):
            raise ConfigError(f"the planner does not know models of type {config.model_type!r}.")
        self.ep_size = settings.moe.ep_size
        self.half = bool(settings.training.bf16)
        self.texts = Texts(0, 0.0)
        self.notes = self._notes()
        self.counts = self._counts()
        beside = self._discriminators(1)
        if beside.total:
            self.counts["discriminators"] = beside

    def _notes(self) -> list[str]:
        if not isinstance(self.model, CellVAE):
            return []
        found = [
            "a cell passes one species' expert; 'discriminators' are adversaries, critics and the "
            "map to anchors"
        ]
        for size in range(1, len(self.model.modalities) + 1):
            if len(self.model.modalities) % size == 0:
                local = shard(self.model, ep_size=size)
                held = sum(p.numel() for p in local.species.parameters())
                whole = sum(p.numel() for p in local.parameters())
                names = ", ".join(local.species.local_names)
                found.append(
                    f"ep_size {size}: the fullest process holds the expert(s) of {names}, "
                    f"{held:,} of its {whole:,} parameters"
                )
        return found

    def _counts(self) -> dict[str, ParameterCount]:
        """The expert of each species, core and conditioner; or encoders and decoders."""
        parts: dict[str, tuple[nn.Module, bool]] = {}
        if isinstance(self.model, CellVAE):
            parts |= {name: (part, True) for name, part in self.model.species.experts.items()}
            parts |= {"core": (self.model.core, False)}
            parts |= {"conditioner": (self.model.conditioner, False)}
        else:
            own: Any = self.model
            for what, group in (("enc.", own.encoders), ("dec.", own.decoders)):
                parts |= {f"{what} {name}": (part, False) for name, part in group.items()}
        found = {name: _count(part, expert=expert) for name, (part, expert) in parts.items()}
        if rest := sum(p.numel() for p in self.model.parameters()) - sum(
            one.total for one in found.values()
        ):
            found["rest"] = ParameterCount(rest, 0, rest, rest)
        return found

    def _discriminators(self, ep_size: int) -> ParameterCount:
        """What plays against the model, of the fullest process."""
        objective = self._objective()
        size = 0
        if isinstance(objective, CellObjective):
            nowhere = torch.device("meta")
            objective.prepare(shard(self.model, ep_size=ep_size), device=nowhere, seed=0)
            if objective.adversary is not None:
                size += _size(objective.adversary.module)
            if objective.anchor is not None:
                size += _size(objective.anchor.held.module)
            if objective.critics is not None:
                size += sum(_size(one.module) for one in objective.critics.held.values())
        return ParameterCount(size, 0, size, size)

    def _objective(self) -> Any:
        return plain_objective(self.settings, problem_type="none")

    @functools.cached_property
    def sizes(self) -> dict[str, int]:
        """Species -> training cells."""
        assert isinstance(self.source, CellsData)
        rows = self.source.species_rows(self.settings.data.train_split)
        return {name: len(own) for name, own in rows.items()}

    def scenarios(self, samples: int) -> list[dict[str, int]]:
        """Cells of each species in one step of an expert-parallel group, as it may come to.

        A species has its share and, where turns are drawn, what chance adds in hundreds of steps.
        When the others are through, the rest of an epoch is cells of the most frequent species.
        """
        if not isinstance(self.model, CellVAE):
            return [{name: samples for name in self.model.modalities}]
        total, names = samples * self.ep_size, list(self.sizes)
        data: Any = self.source
        share = dict.fromkeys(names, 1 / len(names))
        if data.sampler == PROPORTIONAL:
            share = {name: size / sum(self.sizes.values()) for name, size in self.sizes.items()}
        found = []
        for name in names:
            more = 0.0
            if data.sampler in DRAWN:
                more = DEVIATIONS * math.sqrt(total * share[name] * (1 - share[name]))
            own = min(total, round(total * share[name] + more))
            left = total - own
            rest = 1 - share[name] or 1.0
            others = {other: round(left * share[other] / rest) for other in names if other != name}
            found.append({one: own if one == name else others[one] for one in names})
        if data.sampler not in (PROPORTIONAL, LONGEST) and len(set(self.sizes.values())) > 1:
            most = max(names, key=lambda name: self.sizes[name])
            found.append({name: total if name == most else 0 for name in names})
        return found

    def rows(self, samples: int) -> dict[str, int]:
        """Rows of the step that has most genes in it."""
        config: Any = self.config
        if not isinstance(self.model, CellVAE):
            return self.scenarios(samples)[0]
        return max(
            self.scenarios(samples),
            key=lambda one: sum(count * len(config.genes[name]) for name, count in one.items()),
        )

    def timeline(self, *, recompute_every: int) -> Timeline:
        """Bytes of activations through a micro-batch."""
        if isinstance(self.model, CellVAE):
            return record_cells(
                self.model.config,
                self._objective,
                entries=self._entries(),
                ep_size=self.ep_size,
                half=self.half,
            )
        own: Any = self.model

        def build(samples: int) -> Small:
            model = MixtureVAE(copy.deepcopy(own.config))
            model = model.bfloat16() if self.half else model
            return Small(model, self._objective(), lambda: self._pairs(samples))

        found = factors(build, SMALL_BATCHES, lambda n: {"1": 1.0, "B": float(n)})
        return found.timeline((), [{"1": 1.0}, {"B": 1.0}])

    def _pairs(self, samples: int) -> Batch:
        """Samples with everything, of ones: pictures and counts can be that."""
        config: Any = self.config
        dtype = torch.bfloat16 if self.half else torch.float32
        inputs = {
            name: {"values": torch.ones(samples, *config.shape(name), dtype=dtype)}
            for name in self.model.modalities
        }
        present = torch.ones(samples, len(inputs), dtype=torch.bool)
        return Batch.of([str(row) for row in range(samples)], present, inputs)

    def _entries(self) -> dict[str, float]:
        """Species -> mean number of genes that a cell has."""
        data: Any = self.source
        entries: dict[str, list[int]] = {name: [] for name in data.modalities}
        cells: dict[str, int] = dict.fromkeys(data.modalities, 0)
        for file in data.files:
            entries[file.listed.species].append(file.store.num_entries)
            cells[file.listed.species] += file.store.num_rows
        return {name: sum(own) / max(1, cells[name]) for name, own in entries.items()}

    def overlay(self, zero: ZeroSettings, timeline: Timeline | None = None) -> Overlay:
        """What the engine holds, and the discriminators beside it."""
        found = super().overlay(zero, timeline)
        size = self._discriminators(zero.ep_size).total
        return replace(
            found,
            weights=found.weights + FLOAT32 * size,
            optimizer=found.optimizer + 2 * FLOAT32 * size,
            start=found.start + FLOAT32 * size,
        )

    def memory(self, samples: int, over: Overlay, timeline: Timeline | None = None) -> Memory:
        """Bytes of one process in the step that needs most."""
        line = timeline or self.plain
        found = (
            peak_memory(line, over, samples=samples, rows=rows) for rows in self.scenarios(samples)
        )
        return max(found, key=lambda one: one.device)

    def sparse_layers(self, samples: int) -> list[exchange.SparseLayer]:
        """None has a router."""
        return []

    def traffic(self, zero: ZeroSettings, samples: int) -> dict[str, exchange.Traffic]:
        """Bytes that one process sends in a step, by cause."""
        near = self.machine.gpus_per_node
        groups = self.groups(zero)
        out = self._row_bytes(samples, zero) * zero.accumulation * self.machine.imbalance
        return {
            "expert all-to-all": exchange.all_to_all(out, ep_size=zero.ep_size, gpus_per_node=near),
            **exchange.gradient_traffic(groups, zero=zero, gpus_per_node=near),
            "weights all-gather": exchange.weight_traffic(groups, zero=zero, gpus_per_node=near),
        }

    def _row_bytes(self, samples: int, zero: ZeroSettings) -> float:
        """Of a micro-batch: sparse counts once, then rows of W to the core, to the decoder, ..."""
        objective = self._objective()
        if not isinstance(self.model, CellVAE) or not isinstance(objective, CellObjective):
            return 0.0
        entries = self._entries()
        counts = samples * (sum(entries.values()) / len(entries)) * (INDEX_BYTES + zero.element)
        ways = 2.0
        if objective.critic_weight or objective.cycle_weight or objective.latent_cycle_weight:
            ways += 1
        if objective.cycle_weight or objective.latent_cycle_weight:
            ways += 1
        if objective.cycle_weight:
            ways += 1
        return counts + 2 * ways * samples * self.model.config.expert_width * zero.element

    def flops(self, samples: int) -> float:
        """Operations of one step on one process, forward and backward."""
        steps = self.settings.training.gradient_accumulation_steps
        return max(self.plain.flops(samples, rows) for rows in self.scenarios(samples)) * steps


def _size(part: nn.Module) -> int:
    return sum(entry.numel() for entry in part.parameters())


def _count(part: nn.Module, *, expert: bool) -> ParameterCount:
    size = _size(part)
    return ParameterCount(0 if expert else size, size if expert else 0, size, size)
