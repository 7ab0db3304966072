"""`transformers.Trainer`, subclassed once: streams, objectives, logical checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback

from mm_moe.batch import Batch
from mm_moe.data.loading import SampleLoader, worker_death
from mm_moe.errors import DataError, StoppedError
from mm_moe.models.shards import SHARD_SIZE
from mm_moe.moe.layer import RoutingRecord
from mm_moe.training import runtime, state
from mm_moe.training.alone import skip_exchanges
from mm_moe.training.carried import Carried, LibrarySums
from mm_moe.training.clip import clip_without_zero
from mm_moe.training.fill_steps import FillWarmUp
from mm_moe.training.grad_cache import GradCache
from mm_moe.training.guard import StepGuard
from mm_moe.training.meter import Meter
from mm_moe.training.optimizer import parameter_groups
from mm_moe.training.preemption import StopOnSignal, ignore_in_worker
from mm_moe.training.router_bias import BiasUpdate
from mm_moe.training.saving import Saver
from mm_moe.training.throughput import Throughput

Objective = Callable[[torch.nn.Module, Batch], tuple[torch.Tensor, dict[str, torch.Tensor], Any]]


class MultimodalTrainer(Trainer):
    """Trains a `MultimodalMoEModel` from a sample stream under DeepSpeed.

    Args:
        objective: returns (loss, parts, output) of a batch; lives outside the model.
        make_stream: builds the training stream from the number of samples that earlier steps
            consumed (over all ranks), which makes resume exact at any number of processes.
        learning_rate_scale: learning-rate factor by parameter name.
        save_extra: writes what belongs beside the weights (the processor) into a folder.
        scores: the validation scores that `eval_strategy` asks for; called on every rank.
        guard: decides which optimizer steps are taken, and knows the signals.
        save_on_stop: whether a training that a signal stops writes a checkpoint.
        max_shard_size: the largest file of weights in a model that is saved by itself.
        data_figures: what a log says of the data's streaming; called on every rank.
        saver: writes the checkpoints; by default at once, and all stay.
        **kwargs: what `transformers.Trainer` takes.

    Attributes:
        carried: parts whose state is saved and restored on every rank, by name; whoever adds a
            callback with a state of its own puts it here before `train`.
    """

    model: torch.nn.Module
    data_collator: Any

    def __init__(
        self,
        *,
        objective: Objective,
        make_stream: Callable[[int], IterableDataset],
        learning_rate_scale: Callable[[str], float] = lambda name: 1.0,
        save_extra: Callable[[Path], None] = lambda folder: None,
        scores: Callable[[], dict[str, float]] = dict,
        guard: StepGuard | None = None,
        max_shard_size: str = SHARD_SIZE,
        data_figures: Callable[[], dict[str, float]] = dict,
        saver: Saver | None = None,
        save_on_stop: bool = True,
        **kwargs: Any,
    ) -> None:
        self.objective: Objective = objective
        self.make_stream = make_stream
        self.learning_rate_scale = learning_rate_scale
        self.save_extra = save_extra
        self.max_shard_size = max_shard_size
        self.scores, self.data_figures = scores, data_figures
        self.meter = Meter()
        self.guard = guard or StepGuard()
        self._resume_dir: Path | None = None
        self._loader: SampleLoader | None = None
        self._steps_before = self._samples_before = 0  # of the run that is resumed
        stream = make_stream(0)  # the library only looks whether there are data sets
        super().__init__(train_dataset=stream, eval_dataset=stream, **kwargs)
        self.model_accepts_loss_kwargs = False  # the objective averages over its own rows
        whole: Any = self.model
        self.bias_update = BiasUpdate(whole.sparse_layers())
        self.add_callback(self.bias_update)
        self.add_callback(FillWarmUp(whole))
        self.save_on_stop = save_on_stop
        self.add_callback(StopOnSignal(self.guard.signals, save=save_on_stop))
        self.add_callback(OwedEvaluation(self))
        self.throughput = Throughput(whole, half=self.args.bf16)
        self.add_callback(self.throughput)
        self.saver = saver or Saver(self.folder)
        self.carried: dict[str, Carried] = {"meter": self.meter, "library": LibrarySums(self)}

    def train(  # type: ignore[override]
        self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any
    ) -> Any:
        """Train; `resume_from_checkpoint` is a checkpoint folder that `store.verify` accepts.

        When it returns, the last checkpoint is on the disk, or its loss was told.

        Raises:
            CheckpointError: saving failed and the run stops for it; raised on every rank.
        """
        self._resume_dir = Path(str(resume_from_checkpoint)) if resume_from_checkpoint else None
        self.args.ignore_data_skip = True  # the stream itself starts at the right sample
        if self._resume_dir is not None:
            self.args.eval_on_start = False  # the run has started before
        try:
            result = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
            self.saver.wait()
        except RuntimeError as error:
            raise worker_death(error, num_workers=self.args.dataloader_num_workers) from None
        finally:
            self.saver.join()
            if self._loader is not None:
                self._loader.close()
        return result

    def get_train_dataloader(self) -> DataLoader:
        """Batches of this rank, from where the resumed run stopped."""
        consumed = 0
        if self._resume_dir is not None:
            done = state.progress(self._resume_dir)
            consumed, self._steps_before = int(done["samples"]), int(done["step"])
        self._samples_before = consumed
        workers = self.args.dataloader_num_workers
        self._loader = SampleLoader(
            self.make_stream(consumed),
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            persistent_workers=workers > 0,
            worker_init_fn=ignore_in_worker,
            generator=torch.Generator(),  # a loader's seed is not drawn from the model's generator
        )
        return self._loader

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW over decay x dense/expert groups."""
        if self.optimizer is None:
            cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args)
            groups = parameter_groups(
                self.model,
                weight_decay=self.args.weight_decay,
                learning_rate=self.args.learning_rate,
                scale=self.learning_rate_scale,
            )
            self.optimizer = cls(groups, **kwargs)
        return self.optimizer

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        """Let the Trainer build the engine, but restore from our logical checkpoint."""
        model, loader = super()._prepare_for_training(max_steps, train_dataloader, None)
        clip_without_zero(model)
        skip_exchanges(model)
        self.guard.attach(model, step=self._steps_before)
        if resume_from_checkpoint is not None:
            state.restore(Path(resume_from_checkpoint), engine=model, scheduler=self.lr_scheduler)
            self.guard.load(state.progress(Path(resume_from_checkpoint)).get("guard"))
        self.meter.start()
        return model, loader

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            state.restore_ranks(Path(checkpoint), self.carried)

    def _init_training_state(self, max_steps, *args, **kwargs):
        """How often to log and save is said by the flags, whatever a checkpoint says."""
        found = super()._init_training_state(max_steps, *args, **kwargs)
        self.state.compute_steps(self.args, max_steps)
        return found

    def _run_epoch(self, *, epoch, epochs_trained, resume_from_checkpoint, **kwargs):
        """Take no step beyond the last one when a finished training is resumed."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(
                epoch=epoch,
                epochs_trained=epochs_trained,
                resume_from_checkpoint=resume_from_checkpoint,
                **kwargs,
            )
            return
        self._load_rng_state(resume_from_checkpoint)
        self.control.should_training_stop = True

    def get_batch_samples(self, *args: Any, **kwargs: Any):
        """As in the library, under the clock; a `GradCache` then makes its first pass."""
        with self.throughput.waiting():
            batches, count = super().get_batch_samples(*args, **kwargs)
        if isinstance(self.objective, GradCache) and batches:
            self.guard.before_forward()
            with self.compute_loss_context_manager():
                self.objective.begin(self.model, [self._ready(batch) for batch in batches])
        return batches, count

    def _ready(self, batch: Batch) -> Batch:
        """The batch where the model is."""
        moved: Any = self._prepare_inputs(batch)
        return moved

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The objective's loss; its parts and the routing go to the meter.

        Raises:
            DataError: no rank has a token in this batch; raised on every rank.
        """
        self.guard.before_forward()
        with self.throughput.training_pass(inputs):
            loss, parts, output = self.objective(model, inputs)
        refuse_empty(inputs, output.routing)
        self.guard.add(loss, inputs.ids)
        self.bias_update.add(output.routing)
        self.meter.add(parts, output.routing)
        return (loss, output) if return_outputs else loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Forward and backward of a micro-batch, and with a step's last one the optimizer.

        Returns:
            What the step adds to the logged loss, once it was taken.

        Raises:
            BadNumbersError: too many skipped steps in a row.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.guard.verdict is False:
            self.bias_update.forget()
        return self.guard.counted(loss)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add loss parts, expert load and speed to a training log; called on every rank."""
        if "loss" in logs:
            summary = self.meter.summary(self.throughput.take())
            blocked = {"perf/save_blocked_s": self.saver.take_blocked_s()}
            logs = {**logs, **self.guard.summary(logs["loss"]), **summary, **blocked}
            logs |= self.data_figures()
        super().log(logs, start_time)

    def evaluate(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any):
        """Score the validation split as the final table does; logged as "eval_CONDITION_METRIC".

        Raises:
            StoppedError: on every rank, by a signal to any; the step is saved, and a run that goes
                on from it makes up for the evaluation.
        """
        self.model_wrapped.eval()
        try:
            scores = self.scores()
        except StoppedError:
            self.guard.owes_evaluation = True
            if self.save_on_stop:
                self._save_checkpoint(self.model_wrapped, None)
                self.saver.wait()
            raise
        self.guard.owes_evaluation = False
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    @property
    def samples_seen(self) -> int:
        """Training samples consumed over all ranks since the start of the run."""
        steps = self.state.global_step - self._steps_before
        batch = self.args.per_device_train_batch_size * self.args.world_size
        return self._samples_before + steps * batch * self.args.gradient_accumulation_steps

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return Path(str(self.args.output_dir))

    def _save_checkpoint(self, model, trial) -> None:
        """Save this step through `saver`; every rank calls it."""
        step = self.state.global_step
        self.saver.save(
            step,
            lambda apart: state.take(
                engine=self.model_wrapped,
                scheduler=self.lr_scheduler,
                trainer_state=self.state,
                samples=self.samples_seen,
                guard=self.guard.state(),
                save_extra=self.save_extra,
                parts=self.carried,
                apart=apart,
            ),
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Publish a Hugging Face folder with all experts (`final`); every rank must call it."""
        state.save_weights(
            Path(output_dir or self.folder / "final"),
            self.model,
            save_extra=self.save_extra,
            max_shard_size=self.max_shard_size,
        )


class OwedEvaluation(TrainerCallback):
    """Makes up, where a run goes on, for the evaluation that a signal cut short."""

    def __init__(self, trainer: MultimodalTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate the step that was saved; its log line comes where it would have come."""
        if self.trainer.guard.owes_evaluation:
            self.trainer.evaluate()


def refuse_empty(batch: Batch, routing: Mapping[str, RoutingRecord]) -> None:
    """Refuse a batch in which no sample of any rank has any modality: nothing to learn from.

    The records count the tokens of all ranks, so all ranks agree. A model without sparse layers has
    no record and is not asked.

    Raises:
        DataError: on every rank, with the first ids of that rank.
    """
    counts = [record.metrics["tokens"] for record in routing.values() if "tokens" in record.metrics]
    if not counts or torch.stack(counts).any():
        return
    if runtime.any_rank(bool(batch.present.any())):
        return  # tokens in towers without experts
    ids = ", ".join(repr(name) for name in batch.ids[:3]) or "none"
    raise DataError(
        f"no token in a batch: none of the {len(batch.ids)} samples of this process (first: "
        f"{ids}) nor of the other {runtime.world_size() - 1} processes has any modality. Mend or "
        "drop such samples, or take a larger batch (--global_batch_size)."
    )
