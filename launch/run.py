"""Runs a checked set of settings: train, compare, score, report."""

from __future__ import annotations

import argparse
import datetime
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from finetune.interaction_view import view_of
from launch import (
    check_faults,
    check_hub,
    check_objective,
    checks,
    fill_flags,
    interaction_experts,
    interaction_flags,
    members,
    model_flags,
    moe_flags,
    own_models,
)
from launch.assemble import Run, for_comparison, prepare_run
from launch.check_reports import wanted_trackers
from launch.check_resume import resume_comparison, settle_resume
from launch.cli import RecipeParser, Settings
from launch.finish import finish_run, how_to_go_on, without_secrets
from launch.fusion_experts import fusion_layout
from launch.pushing import Pushing
from launch.run_lock import RunLock
from launch.starts import Start
from launch.tables import settle_tables
from launch.zero_shot import check_zero_shot
from mm_moe.data.schema import DataSource
from mm_moe.errors import BadNumbersError, ConfigError, StoppedError
from mm_moe.training import runtime
from mm_moe.training.callbacks import EpochOfStream, MetricsFile, Progress
from mm_moe.training.early_signals import EarlySignals
from mm_moe.training.preemption import StopSignals
from mm_moe.training.rendezvous import check_alone, check_environment
from mm_moe.training.reporting import trackers
from mm_moe.training.watchdog import Heartbeat, Watchdog, collective_timeout_s


def settle(values: argparse.Namespace, ep_size: int, source: DataSource) -> None:
    """Fill in what depends on the machine and the data; nothing of it changes the science."""
    values.ep_size = ep_size
    values.remove_unused_columns = False
    values.logging_nan_inf_filter = False  # a hidden NaN is a lost day
    values.disable_tqdm = True  # our own progress line instead
    if (values.pretrained or "none").lower() == "none":
        values.pretrained = None
    values.use_cpu = values.use_cpu or not torch.cuda.is_available()
    values.dataloader_pin_memory = torch.cuda.is_available()
    values.report_to = wanted_trackers(values)
    if values.max_steps <= 0:
        size = source.size(values.train_split)
        if size is None:
            raise ConfigError(
                f"data set {values.dataset!r} does not know its size; give --max_steps instead of "
                "--num_train_epochs."
            )
        batch = values.per_device_train_batch_size * values.gradient_accumulation_steps
        batch *= runtime.world_size()
        values.max_steps = max(1, math.ceil(values.num_train_epochs * size / batch))


def default_output(recipe: str) -> str:
    """A new folder below `runs/`, named by recipe and time; rank 0 decides."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return str(Path("runs") / f"{Path(recipe).stem}-{stamp}")


def train_one(
    settings: Settings,
    source: DataSource,
    *,
    prompt: str,
    title: str,
    signals: StopSignals,
    watchdog: Watchdog,
    start: Start | None = None,
    resume: Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Run:
    """Train one model and return it, still spread over the ranks.

    Args:
        settings: of the run.
        source: the data set.
        prompt: the prompt of this model.
        title: what the progress line calls it.
        signals: those of this process.
        watchdog: that of this process.
        start: of the run: what it goes on from and whom it reports to; compared and written down
            before anything is trained. None for a comparison, which reports to nobody.
        resume: the verified checkpoint that a comparison goes on from.
        callbacks: further ones.

    Raises:
        StoppedError: on every rank, by a signal to any of them.
    """
    training = settings.training
    folder = Path(str(training.output_dir))
    batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
    run = prepare_run(
        settings,
        source,
        prompt=prompt,
        ep_size=settings.moe.ep_size,
        callbacks=[
            EpochOfStream(source.size(settings.data.train_split), batch * training.world_size),
            *trackers(start.report_to if start else [], folder),
            MetricsFile(folder),  # behind the trackers: it says what they have
            Progress(title),
            *callbacks,
        ],
        signals=signals,
        # without checkpoints of the run, a comparison's could not be come back to
        save_on_stop=start is not None or training.save_strategy != "no",
    )
    if start is not None:
        start.check(run)
        resume = start.resume
    elif resume is not None:
        checks.check_same_model(resume, run.model.config.to_dict())
    run.trainer.add_callback(Heartbeat(watchdog))  # behind what asks for saves
    begin(run, title, start)
    signals.check(where=f"{title} was not begun")
    run.trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    signals.check(where=f"{title} at step {run.trainer.state.global_step}")
    run.note_data()
    return run


def begin(run: Run, title: str, start: Start | None) -> None:
    """Make the run's folder, say what is about to be trained, and write it down, on rank 0."""
    for kind in (PrinterCallback, ProgressCallback):
        run.trainer.remove_callback(kind)
    if not runtime.is_main():
        return
    folder = Path(str(run.settings.training.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    describe(run, title)
    if start is not None:
        start.write(folder)
        run.trainer.saver.run_id = start.run_id


def describe(run: Run, title: str) -> None:
    """Say what is about to be trained."""
    training = run.settings.training
    parts = ", ".join(f"{name} {count:,}" for name, count in run.model.trainable_report())
    missing = run.train_missing.describe(run.source.modalities)
    print(f"{title}: trains {parts} parameters")
    print(
        f"  data {run.source.name}, missing: {missing}; {training.world_size} process(es), "
        f"experts over {run.settings.moe.ep_size}, {training.max_steps} steps",
        flush=True,
    )


def check(values: argparse.Namespace, argv: list[str]) -> DataSource:
    """Refuse what cannot work before anything is written, and fill in the rest.

    What the run's folder holds is looked at by `settle_resume`, where a checkpoint is wanted.

    Returns:
        The data set.
    """
    check_environment()
    model_flags.settle_model(values, argv)
    interaction_experts.settle_interaction_experts(values, argv)
    checks.check_names(values)
    checks.check_json(values)
    check_objective.settle_objective(values, argv)
    checks.in_range(values)
    check_faults.check_faults(values)
    moe_flags.settle_moe(values, argv)
    checks.check_supported(values)
    check_hub.check_hub_flags(values)
    checks.settle_batch(values, argv)
    values.deepspeed = checks.deepspeed_settings(values)
    ep_size = fusion_layout(values, ep_size=moe_flags.expert_layout(values))
    moe_flags.check_backend(values, ep_size=ep_size)
    source = checks.open_source(values)
    check_zero_shot(values, source)
    interaction_flags.check_interactions(values, source)
    source = view_of(source, vars(values))
    ep_size = interaction_experts.interaction_layout(values, source, ep_size=ep_size)
    ep_size = fill_flags.fill_layout(values, source, ep_size=ep_size)
    ep_size = own_models.check_own_model(values, source, ep_size=ep_size)
    members.check_members(values, source)
    if not values.resume_from_checkpoint:
        checks.check_output(values, resume=None)
    settle_tables(values, checks.typed_flags(argv), source)
    settle(values, ep_size, source)
    return source


def start_processes(values: argparse.Namespace) -> None:
    """Join the other processes, with limits that agree: the watchdog has more to say than gloo."""
    check_alone()
    runtime.start(
        timeout_s=collective_timeout_s(values.hang_timeout_s, ddp_timeout_s=values.ddp_timeout),
        rendezvous_timeout_s=values.rendezvous_timeout_s,
    )


def claim_output(values: argparse.Namespace, lock: RunLock) -> Path:
    """The run's folder, named by rank 0 where no flag does, and locked by it. A collective."""

    def claim() -> str:
        name = values.output_dir or default_output(values.config)
        lock.take(Path(name))
        return name

    values.output_dir = runtime.from_main(claim)
    return Path(values.output_dir)


def execute(
    parser: RecipeParser,
    values: argparse.Namespace,
    argv: list[str],
    *,
    recipe: dict[str, Any] | None = None,
    early: EarlySignals | None = None,
) -> None:
    """Check everything, then train, score, report and publish.

    A rank that fails leaves the process group as it is: the launcher ends the others. Where all
    stop together, by a signal or by bad numbers, each leaves the group first.

    Args:
        parser: of the flags.
        values: what it made of them.
        argv: the command line.
        recipe: flags of the recipe, where they come from the run that is resumed.
        early: signals since the program began.

    Raises:
        StoppedError: a signal asked for it; the text ends with the command that goes on.
    """
    start = Start.of(values, argv, recipe=recipe)
    source = check(values, argv)
    alone = runtime.world_size() == 1  # one process refuses before it starts up
    target, argv = check_hub.hub_target(values), without_secrets(argv)
    with RunLock() as lock, StopSignals(early) as signals:
        start.resume = settle_resume(values, lock) if alone else None
        start_processes(values)
        start.resume = start.resume if alone else settle_resume(values, lock)
        if target:
            check_hub.refuse_wrong_token(target)
        folder = claim_output(values, lock)
        (watchdog := Watchdog(folder, limit_s=values.hang_timeout_s)).start()
        values.resume_from_checkpoint = str(start.resume) if start.resume else None
        values.run_name = values.run_name or folder.name  # same after a resume
        start.report_to, values.report_to = values.report_to, "none"  # trackers are ours alone
        settings = parser.build(values)
        pushing = Pushing(target, folder, strategy=str(values.hub_strategy))
        try:
            with start.ends(folder):
                train_and_finish(
                    settings,
                    source,
                    signals=signals,
                    watchdog=watchdog,
                    start=start,
                    callbacks=pushing.callbacks,
                )
        except (StoppedError, BadNumbersError) as error:
            pushing.close()
            runtime.stop()
            if isinstance(error, BadNumbersError):
                raise
            raise type(error)(f"{error}. {how_to_go_on(settings, folder, argv)}") from None
        finally:
            watchdog.stop()
        runtime.stop()
    pushing.finish()  # no rank waits for it, and a signal ends it at once


def train_and_finish(
    settings: Settings,
    source: DataSource,
    *,
    signals: StopSignals,
    watchdog: Watchdog,
    start: Start,
    callbacks: Sequence[TrainerCallback] = (),
) -> None:
    """Train the model and those that it is compared with, then score and report."""
    signals.check(where="nothing was begun")
    prompt, folder = settings.prompt.prompt, Path(str(settings.training.output_dir))
    run = train_one(
        settings,
        source,
        prompt=prompt,
        title=settings.run.objective if own_models.own_model(settings.run.objective) else prompt,
        signals=signals,
        watchdog=watchdog,
        start=start,
        callbacks=callbacks,
    )
    run.trainer.save_model(str(folder / "final"))
    others = [
        train_one(
            for_comparison(settings, folder / f"compare-{name}"),
            source,
            prompt=name,
            title=f"comparison: {name}",
            signals=signals,
            resume=resume_comparison(folder / f"compare-{name}") if start.resume else None,
            watchdog=watchdog,
        )
        for name in settings.run.compare_with
        if settings.run.final_evaluation  # comparisons live in the final table only
    ]
    finish_run(run, others, folder, start.argv)
