"""Saves and restores a run: weights, optimizer, schedule, random states, place in the data."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import TrainerState

from mm_moe.checkpoint import logical, store
from mm_moe.errors import CheckpointError
from mm_moe.models.shards import SHARD_SIZE
from mm_moe.training import runtime

PROGRESS = "progress.json"


def save_weights(
    folder: Path,
    model,
    *,
    save_extra: Callable[[Path], None],
    max_shard_size: str = SHARD_SIZE,
) -> None:
    """Write a Hugging Face folder that holds every expert. A collective: call it on every rank."""
    weights = logical.full_weights(model)
    if runtime.is_main():
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder, state_dict=weights, max_shard_size=max_shard_size)
        save_extra(folder)
    runtime.barrier()


def save(
    run_dir: Path,
    *,
    engine,
    scheduler,
    trainer_state: TrainerState,
    samples: int,
    save_extra: Callable[[Path], None],
    keep: int | None,
    guard: dict[str, Any] | None = None,
) -> Path:
    """Write `checkpoint-STEP` of a run aside, then publish it. A collective.

    Args:
        run_dir: the run's folder.
        engine: the DeepSpeed engine.
        scheduler: the learning-rate scheduler (or a wrapper with its state).
        trainer_state: the Trainer's own state.
        samples: training samples consumed over all ranks.
        save_extra: writes the processor into the folder.
        keep: how many checkpoints stay.
        guard: the state of the `StepGuard`.
    """
    step = trainer_state.global_step
    final, aside = run_dir / f"checkpoint-{step}", run_dir / f".saving-checkpoint-{step}"
    if runtime.is_main():
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    runtime.barrier()
    save_weights(aside, engine.module, save_extra=save_extra)
    tensors, optimizer_step = logical.optimizer_tensors(engine)
    torch.save(_random_state(), aside / f"random-{engine.global_rank}.pt")
    if runtime.is_main():
        save_file(tensors, aside / store.OPTIMIZER)
        (aside / store.SCHEDULER).write_text(json.dumps(_plain(scheduler.state_dict())))
        (aside / PROGRESS).write_text(
            json.dumps(
                {
                    "samples": samples,
                    "step": step,
                    "optimizer_step": optimizer_step,
                    "guard": guard,
                }
            )
        )
        trainer_state.save_to_json(str(aside / store.TRAINER_STATE))
    runtime.barrier()
    if runtime.is_main():
        store.write_manifest(aside, step)
        store.publish(aside, final)
        store.prune(run_dir, keep)
    runtime.barrier()
    return final


def progress(folder: Path) -> dict[str, Any]:
    """How far the run of a checkpoint had come: samples, steps, and what it skipped."""
    return json.loads((folder / PROGRESS).read_text())


def restore(folder: Path, *, engine, scheduler) -> None:
    """Put a checkpoint into a fresh engine of any ZeRO stage <= 2 and any layout.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    done = progress(folder)
    weights, moments = folder / store.WEIGHTS, folder / store.OPTIMIZER
    logical.load_weights(engine.module, store.reader(weights), file=weights)
    logical.load_optimizer(engine, store.reader(moments), done["optimizer_step"], file=moments)
    saved = json.loads((folder / store.SCHEDULER).read_text())
    scheduler.load_state_dict({**scheduler.state_dict(), **saved})
    rates = saved["_last_lr"]
    groups = engine.optimizer.param_groups
    if len(groups) != len(rates):
        raise CheckpointError(
            f"{str(folder)!r} has {len(rates)} parameter groups, this run has {len(groups)}; "
            "resume with the settings of that run."
        )
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
    engine.global_steps = done["step"]


def _plain(values: dict) -> dict:
    """The entries of a scheduler's state that JSON holds exactly; functions are rebuilt."""
    keep = {}
    for key, value in values.items():
        try:
            json.dumps(value)
        except TypeError:
            continue
        if key != "lr_lambdas":
            keep[key] = value
    return keep


def _random_state() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 (the global one is meant)
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_state(folder: Path, *, rank: int) -> None:
    """Restore a rank's random states; a rank that the saved run did not have keeps its own seed."""
    file = folder / f"random-{rank}.pt"
    if not file.is_file():
        return
    saved = torch.load(file, weights_only=True)
    kind, keys, *rest = saved["numpy"]
    random.setstate(saved["python"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(saved["cuda"])
