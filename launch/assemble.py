"""Builds a run's parts from its settings: model, data pipeline, trainer."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from torch.utils.data import IterableDataset
from transformers import TrainerCallback, set_seed

from launch.check_blip2 import check_start_token
from launch.check_objective import objective_of
from launch.cli import Settings
from launch.held_out import held_out_scores
from launch.interaction_flags import training_interactions
from launch.members import composed_config, composed_model
from launch.model_config import model_config
from launch.own_models import carry_objective, own_config, prepare_objective, processors_of
from launch.scoring import Scorer, train_prior
from launch.supports import supports_of
from launch.tables import read_tables
from launch.zero_shot import ZeroShot, flat, has_pairs, zero_shot_of
from mm_moe.arguments import ModelArguments, dataset_options, parse_json
from mm_moe.batch import base_modality
from mm_moe.data.augment import Augment, Variation
from mm_moe.data.collate import Collator
from mm_moe.data.complete_rows import CompleteRows
from mm_moe.data.missing import MissingProtocol
from mm_moe.data.modality_dropout import ModalityDropout
from mm_moe.data.schema import DataSource
from mm_moe.data.streaming import SampleStream
from mm_moe.data.table import MissingTable
from mm_moe.errors import ConfigError
from mm_moe.models.building import build_model
from mm_moe.models.composed_configuration import ComposedConfig
from mm_moe.models.configuration import MultimodalMoEConfig
from mm_moe.models.folder import AnyConfig, AnyModel, new_model
from mm_moe.models.processing import ImageProcessor, save_processors
from mm_moe.models.take_head import take_head
from mm_moe.moe.parallel import make_expert_parallel
from mm_moe.training import runtime
from mm_moe.training.bad_samples import BadSamples
from mm_moe.training.guard import StepGuard
from mm_moe.training.held_out import HeldOut
from mm_moe.training.preemption import StopSignals
from mm_moe.training.saving import Saver
from mm_moe.training.trainer import MultimodalTrainer

INITIAL_BATCH = 32  # samples that are embedded at once to start a prompt


def run_config(settings: Settings, source: DataSource, *, prompt: str) -> AnyConfig:
    """The configuration of the run's model: of one model, or of several members."""
    if (own := own_config(settings, source)) is not None:
        return own
    if settings.model.experts_over:
        return composed_config(settings, source, prompt=prompt)
    return model_config(settings, source, prompt=prompt)


def dense_model(settings: Settings, config: AnyConfig) -> AnyModel:
    """A single-process model with all experts, the same on every rank."""
    set_seed(settings.training.seed)
    model: AnyModel
    if isinstance(config, ComposedConfig):
        model = composed_model(settings, config)
    elif not isinstance(config, MultimodalMoEConfig):
        model = new_model(config)
    else:
        model = build_model(config, pretrained=settings.model.pretrained)
        if settings.model.keep_head:
            take_head(model, str(settings.model.pretrained))
    model.freeze(
        lock=locked_towers(settings.model, model.modalities),
        unlock_blocks=settings.model.unlock_blocks,
    )
    return model


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
    model: AnyModel
    scorer: Scorer
    trainer: MultimodalTrainer = field(init=False)
    bad_samples: BadSamples = field(init=False)
    stream_retries: int = 0  # of training, when it is over

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

    @cached_property
    def train_source(self) -> DataSource:
        """What training reads its rows from: the data, or their complete rows.

        Raises:
            DataError: only these are wanted, and there are none.
        """
        data = self.settings.data
        if not data.drop_incomplete:
            return self.source
        return CompleteRows(self.source, split=data.train_split, missing=self.train_missing)

    def train_collator(self) -> Collator:
        """The collator of the training split; bad samples are counted over the ranks elsewhere."""
        interactions = training_interactions(self.settings.data)
        collator = self.scorer.collator(self.train_missing, interactions=interactions)
        collator.max_bad_samples = None
        collator.variation = self.train_variation()
        if rate := self.settings.data.modality_dropout:
            collator.dropout = ModalityDropout(
                rate=rate, dataset=self.source.name, seed=self.data_seed
            )
        return collator

    def find_supports(self) -> None:
        """Let batches of training and scoring bring what the fill asks for. A collective."""
        self.scorer.supports = supports_of(
            self.settings.model.fill,
            parse_json("fill_config", self.settings.model.fill_config),
            self.source,
            split=self.settings.data.train_split,
            missing=self.train_missing,
            seed=self.data_seed,
            folder=Path(str(self.settings.training.output_dir)),
            source_options=dataset_options(vars(self.settings.data)),
        )

    def train_variation(self) -> Variation:
        """What captions and pictures training sees of the samples, by epoch."""
        options = parse_json("augment", self.settings.data.augment)
        found = self.scorer.processors
        return Variation(
            seed=self.data_seed,
            augment=Augment.of(options) if options else None,
            sizes={
                name: (int(processor.width), int(processor.height))
                for name, processor in found.items()
                if isinstance(processor, ImageProcessor) and processor.width and processor.height
            },
        )

    @property
    def data_seed(self) -> int:
        """Of the order of the samples, and of what varies in them."""
        training = self.settings.training
        return training.data_seed if training.data_seed is not None else training.seed

    def watch_bad_samples(self) -> BadSamples:
        """Writes down, counts and limits the undecodable samples of the training split."""
        data = self.settings.data
        return BadSamples(
            self.trainer.folder,
            found=self.trainer.data_collator.bad,
            max_samples=data.max_bad_samples,
            max_share=data.max_bad_share,
            size=self.train_source.size(data.train_split),
            samples_seen=lambda: self.trainer.samples_seen,
        )

    def note_data(self) -> None:
        """Keep what training met in its data, for `run.json`. A collective."""
        self.scorer.add_bad(self.bad_samples.known)
        self.stream_retries = self.num_retries()

    def num_retries(self) -> int:
        """Requests that were repeated, over all ranks. A collective."""
        remote = self.source.remote
        return sum(runtime.gather_objects(0 if remote is None else remote.num_retries))

    def data_figures(self) -> dict[str, float]:
        """What a log says of a data set at addresses. A collective."""
        return {} if self.source.remote is None else {"data/retries": float(self.num_retries())}

    def train_stream(self, start: int) -> IterableDataset:
        """The endless training stream of this rank, from a global sample position."""
        training = self.settings.training
        return SampleStream(
            self.train_source,
            split=self.settings.data.train_split,
            batch_size=training.per_device_train_batch_size,
            rank=training.process_index,
            world_size=training.world_size,
            seed=self.data_seed,
            shuffle_buffer=self.settings.data.shuffle_buffer,
            start=start,
            epochs=None,
        )

    def initialise_prompt(self) -> None:
        """Start a prompt that asks for it from the first training samples, the same on all ranks.

        Their number and order do not depend on the number of processes.
        """
        wanted = max((prompt.initial_samples for prompt in self.model.prompts), default=0)
        training = self.settings.training
        if not wanted:
            return
        stream = SampleStream(
            self.train_source,
            split=self.settings.data.train_split,
            batch_size=1,
            seed=self.data_seed,
            shuffle_buffer=self.settings.data.shuffle_buffer,
            epochs=1,
        )
        samples = list(itertools.islice(stream, wanted))
        starts, collator = range(0, len(samples), INITIAL_BATCH), self.train_collator()
        set_seed(training.seed)
        self.model.initialise_prompt(collator(samples[i : i + INITIAL_BATCH]) for i in starts)

    def validation_scores(self) -> dict[str, float]:
        """Scores of the validation split: by condition and metric, or the objective's own.

        A collective.
        """
        data = self.settings.data
        if isinstance(self.trainer.objective, HeldOut):
            return held_out_scores(self.trainer.objective, self.scorer, data)
        if has_pairs(self.source):
            return flat(self.zero_shot().rows(data.validation_split))
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

    def zero_shot(self) -> ZeroShot:
        """What scores a model that was trained without task labels."""
        return zero_shot_of(
            dataclasses.asdict(self.settings.data),
            self.source,
            model=self.model,
            processors=self.scorer.processors,
            batch_size=self.settings.training.per_device_eval_batch_size,
        )

    def save_extra(self, folder: Path) -> None:
        """Write the processor beside the weights."""
        save_processors(self.scorer.processors, folder)


def learning_rate_scale(scale: float) -> Callable[[str], float]:
    """Factor for the parts that start from nothing: prompts, fill and head."""

    def of(name: str) -> float:
        own = name.split(".", 2)[-1] if name.startswith("members.") else name
        return scale if own.startswith(("prompt.", "fill.", "head.")) else 1.0

    return of


def prepare_run(
    settings: Settings,
    source: DataSource,
    *,
    prompt: str,
    ep_size: int,
    callbacks: list[TrainerCallback],
    signals: StopSignals | None = None,
    save_on_stop: bool = True,
) -> Run:
    """Build the model, spread its experts over `ep_size` processes and make its trainer."""
    model = dense_model(settings, run_config(settings, source, prompt=prompt))
    make_expert_parallel(model, ep_size=ep_size, backend=settings.moe.moe_backend)
    processors = processors_of(settings, model)
    check_start_token(model.config, processors)
    scorer = Scorer(
        model,
        source,
        processors,
        batch_size=settings.training.per_device_eval_batch_size,
        max_bad_samples=settings.data.max_bad_samples,
        tables=read_tables(settings.data.missing_table, source=source),
        signals=signals,
    )
    run = Run(settings, source, model, scorer)
    run.find_supports()
    run.initialise_prompt()
    objective = objective_of(settings, problem_type=source.problem_type)
    prepare_objective(objective, model, settings)
    runtime.allow_another_trainer()
    run.trainer = MultimodalTrainer(
        model=model,
        args=settings.training,
        objective=objective,
        make_stream=run.train_stream,
        data_collator=run.train_collator(),
        learning_rate_scale=learning_rate_scale(settings.run.new_parts_lr_scale),
        save_extra=run.save_extra,
        scores=run.validation_scores,
        max_shard_size=settings.run.max_shard_size,
        guard=StepGuard(
            max_bad_steps=settings.run.max_bad_steps,
            skip_spikes=settings.run.skip_spikes,
            signals=signals,
            folder=Path(str(settings.training.output_dir)),
        ),
        data_figures=run.data_figures,
        saver=Saver(
            Path(str(settings.training.output_dir)),
            keep=settings.training.save_total_limit,
            background=settings.run.async_save,
            on_failure=settings.run.on_save_failure,
        ),
        save_on_stop=save_on_stop,
        callbacks=callbacks,
    )
    carry_objective(objective, run.trainer)
    run.bad_samples = run.watch_bad_samples()
    run.trainer.add_callback(run.bad_samples)
    return run


def for_comparison(settings: Settings, folder: Path) -> Settings:
    """Settings that train a comparison in the same way, in its own folder.

    One checkpoint is enough to go on where the program died.
    """
    training = copy.copy(settings.training)
    training.output_dir = str(folder)
    training.save_total_limit = 1
    return dataclasses.replace(settings, training=training)
