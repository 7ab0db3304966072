"""Builds a run's parts from its settings: model, data pipeline, trainer."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch.utils.data import IterableDataset
from transformers import TrainerCallback, set_seed

from launch.cli import Settings
from launch.interaction_experts import interaction_fields
from launch.interaction_flags import training_interactions
from launch.scoring import Scorer, train_prior
from launch.tables import read_tables
from mm_moe.arguments import FLAG_OF_SETTING, ModelArguments, parse_json
from mm_moe.batch import base_modality
from mm_moe.data.collate import Collator
from mm_moe.data.missing import MissingProtocol
from mm_moe.data.schema import DataSource
from mm_moe.data.streaming import SampleStream
from mm_moe.data.table import MissingTable
from mm_moe.errors import ConfigError
from mm_moe.models.building import build_model
from mm_moe.models.configuration import MultimodalMoEConfig
from mm_moe.models.modeling import MultimodalMoEModel
from mm_moe.models.processing import processors_for, save_processors
from mm_moe.models.take_head import take_head
from mm_moe.moe.parallel import make_expert_parallel
from mm_moe.registry import BACKBONES, OBJECTIVES
from mm_moe.training import runtime
from mm_moe.training.trainer import MultimodalTrainer

INITIAL_BATCH = 32  # samples that are embedded at once to start a prompt


def moe_settings(moe: Any) -> dict[str, Any] | None:
    """The sparse layers' settings as a plain dict, from `MoEArguments` or the bare flags.

    `num_experts` is a list where it differs between layers; `expert_settings` reads both forms.
    """
    if not moe.moe_enable:
        return None
    flags = {setting: getattr(moe, flag) for setting, flag in FLAG_OF_SETTING.items()}
    if len(moe.num_experts) == 1:
        flags["num_experts"] = moe.num_experts[0]
    return {**flags, **parse_json("moe_config", moe.moe_config)}


def model_config(settings: Settings, source: DataSource, *, prompt: str) -> MultimodalMoEConfig:
    """The model's configuration; the same settings always give the same one."""
    places = {
        name: value
        for name in ("moe_mode", "moe_every")
        if (value := getattr(settings.moe, name)) is not None
    }
    same_prompt = prompt == settings.prompt.prompt
    return MultimodalMoEConfig(
        backbone=settings.model.backbone,
        backbone_config=backbone_settings(settings, source),
        modalities=list(source.modalities),
        moe=moe_settings(settings.moe),
        moe_layers=settings.moe.moe_layers_idx,
        **places,
        prompt=prompt,
        prompt_config=parse_json("prompt_config", settings.prompt.prompt_config)
        if same_prompt
        else {},
        lora=lora_fields(settings.model),
        feature_norm=settings.model.feature_norm,
        upcycle_noise=settings.moe.upcycle_noise,
        upcycle_drop=settings.moe.upcycle_drop,
        interaction_experts=interaction_fields(settings.moe),
        **label_fields(source),
    )


def backbone_settings(settings: Settings, source: DataSource) -> dict[str, Any]:
    """The backbone's own settings, with the widths of feature sequences from the data.

    Raises:
        ConfigError: sequences or arrays for a backbone that takes none.
    """
    given = parse_json("backbone_config", settings.model.backbone_config)
    backbone_class = BACKBONES.resolve(settings.model.backbone)
    if source.arrays and not backbone_class.takes_arrays:
        raise ConfigError(
            f"data set {source.name!r} holds arrays ({', '.join(source.arrays)}), which backbone "
            f"{settings.model.backbone!r} does not take; take --backbone small."
        )
    if not (source.sequences or source.arrays):
        return given
    if source.sequences and not backbone_class.takes_sequences:
        raise ConfigError(
            f"data set {source.name!r} holds feature sequences ({', '.join(source.sequences)}), "
            f"which backbone {settings.model.backbone!r} does not take; take --backbone sequences."
        )
    found: dict[str, Any] = {}
    if source.sequences:
        found["sequences"] = {name: dict(about) for name, about in source.sequences.items()}
    if source.arrays:
        found["arrays"] = {name: dict(about) for name, about in source.arrays.items()}
    return {**found, **given}


def label_fields(source: DataSource) -> dict[str, Any]:
    """The configuration fields of the head: classes, one number, or no head at all."""
    if source.problem_type == "none":
        return {"num_labels": 0}
    if source.problem_type == "regression":
        return {"num_labels": 1, "problem_type": source.problem_type}
    return {"label_names": list(source.label_names), "problem_type": source.problem_type}


def dense_model(settings: Settings, config: MultimodalMoEConfig) -> MultimodalMoEModel:
    """A single-process model with all experts, the same on every rank."""
    set_seed(settings.training.seed)
    model = build_model(config, pretrained=settings.model.pretrained)
    if settings.model.keep_head:
        take_head(model, str(settings.model.pretrained))
    model.freeze(
        lock=locked_towers(settings.model, model.modalities),
        unlock_blocks=settings.model.unlock_blocks,
    )
    return model


def lora_fields(model: ModelArguments) -> dict[str, Any] | None:
    """The adapters that the flags ask for."""
    if model.lora_r == 0:
        return None
    return {
        "r": model.lora_r,
        "alpha": model.lora_alpha,
        "dropout": model.lora_dropout,
        "target": model.lora_target,
    }


def locked_towers(model: ModelArguments, modalities: tuple[str, ...]) -> tuple[str, ...]:
    """The towers whose dense weights are frozen: with LoRA all of them.

    Raises:
        ConfigError: blocks to unlock and no locked tower.
    """
    if model.lora_r:
        return modalities
    flags = (("image", model.lock_image), ("text", model.lock_text))
    kinds = [kind for kind, lock in flags if lock]
    found = {kind: [name for name in modalities if base_modality(name) == kind] for kind in kinds}
    # a kind that the data lack keeps its name, which `freeze` refuses
    locked = tuple(name for kind in kinds for name in found[kind] or [kind])
    if model.unlock_blocks and not locked:
        raise ConfigError(
            f"--unlock_blocks {model.unlock_blocks} unlocks blocks of locked towers, and none is "
            "locked; add --lock_image true or --lock_text true, or leave it out."
        )
    return locked


@dataclass
class Run:
    """One model and what it needs to be trained and scored."""

    settings: Settings
    source: DataSource
    model: MultimodalMoEModel
    scorer: Scorer
    trainer: MultimodalTrainer = field(init=False)

    @property
    def train_missing(self) -> MissingProtocol | MissingTable:
        """What the samples of the training split lack: by the flags, or by a stored table."""
        data = self.settings.data
        protocol = MissingProtocol(
            kind=data.missing_type,
            ratio=data.missing_ratio,
            seed=data.missing_seed,
            dataset=self.source.name,
            split=data.train_split,
        )
        return self.scorer.tables.get(data.train_split, protocol)

    def train_collator(self) -> Collator:
        """The collator of the training split."""
        interactions = training_interactions(self.settings.data)
        return self.scorer.collator(self.train_missing, interactions=interactions)

    def train_stream(self, start: int) -> IterableDataset:
        """The endless training stream of this rank, from a global sample position."""
        training = self.settings.training
        return SampleStream(
            self.source,
            split=self.settings.data.train_split,
            batch_size=training.per_device_train_batch_size,
            rank=training.process_index,
            world_size=training.world_size,
            seed=training.data_seed if training.data_seed is not None else training.seed,
            shuffle_buffer=self.settings.data.shuffle_buffer,
            start=start,
            epochs=None,
        )

    def initialise_prompt(self) -> None:
        """Start a prompt that asks for it from the first training samples, the same on all ranks.

        Their number and order do not depend on the number of processes.
        """
        wanted, training = self.model.prompt.initial_samples, self.settings.training
        if not wanted:
            return
        stream = SampleStream(
            self.source,
            split=self.settings.data.train_split,
            batch_size=1,
            seed=training.data_seed if training.data_seed is not None else training.seed,
            shuffle_buffer=self.settings.data.shuffle_buffer,
            epochs=1,
        )
        samples = list(itertools.islice(stream, wanted))
        starts, collator = range(0, len(samples), INITIAL_BATCH), self.train_collator()
        set_seed(training.seed)
        self.model.initialise_prompt(collator(samples[i : i + INITIAL_BATCH]) for i in starts)

    def validation_scores(self) -> dict[str, float]:
        """Scores of the validation split by condition and metric. A collective."""
        data = self.settings.data
        rows = self.scorer.score(
            prior=train_prior(self.source, data.train_split),
            split=data.validation_split,
            ratio=data.missing_ratio,
            seed=data.missing_seed,
            num_resamples=0,
        )
        return {
            f"{row.condition.replace(' ', '_')}_{name}": value
            for row in rows
            for name, value in row.metrics.items()
        }

    def save_extra(self, folder: Path) -> None:
        """Write the processor beside the weights."""
        save_processors(self.scorer.processors, folder)


def learning_rate_scale(scale: float) -> Callable[[str], float]:
    """Factor for the parts that start from nothing: prompts and head."""

    def of(name: str) -> float:
        return scale if name.startswith(("prompt.", "head.")) else 1.0

    return of


def prepare_run(
    settings: Settings,
    source: DataSource,
    *,
    prompt: str,
    ep_size: int,
    callbacks: list[TrainerCallback],
) -> Run:
    """Build the model, spread its experts over `ep_size` processes and make its trainer."""
    model = dense_model(settings, model_config(settings, source, prompt=prompt))
    make_expert_parallel(model, ep_size=ep_size, backend=settings.moe.moe_backend)
    processors = processors_for(
        model.config, source=settings.model.tokenizer or settings.model.pretrained
    )
    scorer = Scorer(
        model,
        source,
        processors,
        batch_size=settings.training.per_device_eval_batch_size,
        max_bad_samples=settings.data.max_bad_samples,
        tables=read_tables(settings.data.missing_table, source=source),
    )
    run = Run(settings, source, model, scorer)
    run.initialise_prompt()
    objective = OBJECTIVES.resolve(settings.run.objective)(problem_type=source.problem_type)
    collator = run.train_collator()
    runtime.allow_another_trainer()
    run.trainer = MultimodalTrainer(
        model=model,
        args=settings.training,
        objective=objective,
        make_stream=run.train_stream,
        data_collator=collator,
        learning_rate_scale=learning_rate_scale(settings.run.new_parts_lr_scale),
        save_extra=run.save_extra,
        scores=run.validation_scores,
        callbacks=callbacks,
    )
    return run


def for_comparison(settings: Settings, folder: Path) -> Settings:
    """Settings that train a comparison in the same way, without checkpoints, in its own folder."""
    training = copy.copy(settings.training)
    training.output_dir = str(folder)
    training.save_strategy = "no"
    return Settings(
        settings.model, settings.moe, settings.prompt, settings.data, settings.run, training
    )
