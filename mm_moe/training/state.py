"""What a run consists of: weights, optimizer, schedule, random states, place in the data, sums.

Every rank takes part in `take`; what it gives is written by rank 0 alone, at once or later.
"""

from __future__ import annotations

import dataclasses
import io
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerState

from mm_moe.checkpoint import logical, store
from mm_moe.errors import CheckpointError
from mm_moe.models.shards import SHARD_SIZE
from mm_moe.training import runtime
from mm_moe.training.carried import Carried

NO_PARTS: Mapping[str, Carried] = {}


@dataclass
class Snapshot:
    """A step of a run on rank 0, in the memory of the CPU.

    Attributes:
        step: optimizer steps done.
        model: whose class and configuration are saved.
        save_extra: writes the processor into a folder.
        weights: by logical name.
        moments: of the optimizer, "KIND/NAME".
        texts: file name -> its JSON.
        ranks: of every rank, its random states and what its parts carry.
    """

    step: int
    model: Any
    save_extra: Callable[[Path], None]
    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    texts: dict[str, str]
    ranks: list[dict[str, Any]]

    def write_small(self, folder: Path) -> None:
        """Write all but the tensors. Not beside training: a tokenizer serves one at a time."""
        self.save_extra(folder)
        for name, text in self.texts.items():
            (folder / name).write_text(text, encoding="utf-8")
        buffer = io.BytesIO()  # torch's own file writer reports a full disk as a broken assertion
        torch.save(self.ranks, buffer)
        (folder / store.RANKS).write_bytes(buffer.getbuffer())

    def write_large(self, folder: Path) -> None:
        """Write the tensors; needs nothing that training touches."""
        self.model.save_pretrained(folder, state_dict=self.weights, max_shard_size=SHARD_SIZE)
        save_file(self.moments, folder / store.OPTIMIZER)


def take(
    *,
    engine,
    scheduler,
    trainer_state: TrainerState,
    samples: int,
    save_extra: Callable[[Path], None],
    guard: dict[str, Any] | None = None,
    parts: Mapping[str, Carried] = NO_PARTS,
    apart: bool = False,
) -> Snapshot | None:
    """Gather a run's state. A collective; only rank 0 gets it.

    Args:
        engine: the DeepSpeed engine.
        scheduler: the learning-rate scheduler (or a wrapper with its state).
        trainer_state: the Trainer's own state.
        samples: training samples consumed over all ranks.
        save_extra: writes the processor into the folder.
        guard: the state of the `StepGuard`.
        parts: what else each rank carries from step to step.
        apart: in memory of its own, so that training may go on while it is written.
    """
    keep = runtime.is_main()
    weights = logical.full_weights(engine.module, keep=keep, apart=apart)
    moments, optimizer_step = logical.optimizer_tensors(engine, keep=keep, apart=apart)
    carried = {name: part.state_dict() for name, part in parts.items()}
    ranks = runtime.gather_objects({"random": _random_state(), "carried": carried})
    if not keep:
        return None
    step = trainer_state.global_step
    done: dict[str, Any] = {"samples": samples, "step": step, "optimizer_step": optimizer_step}
    texts = {
        store.SCHEDULER: json.dumps(_plain(scheduler.state_dict())),
        store.PROGRESS: json.dumps({**done, "guard": guard}),
        store.TRAINER_STATE: json.dumps(dataclasses.asdict(trainer_state), indent=2) + "\n",
    }
    return Snapshot(step, engine.module, save_extra, weights, moments, texts, ranks)


def save_weights(
    final: Path,
    model,
    *,
    save_extra: Callable[[Path], None],
    max_shard_size: str = SHARD_SIZE,
) -> None:
    """Publish a Hugging Face folder that holds every expert. A collective: call it on every rank.

    Raises:
        CheckpointError: rank 0 cannot write it; raised on every rank.
    """
    weights = logical.full_weights(model, keep=runtime.is_main())

    def write() -> None:
        aside = final.with_name(f"{store.SAVING}{final.name}")
        try:
            store.discard(aside)
            aside.mkdir(parents=True)
            model.save_pretrained(aside, state_dict=weights, max_shard_size=max_shard_size)
            save_extra(aside)
            store.publish(aside, final)
        except Exception as error:
            store.discard(aside)
            raise CheckpointError(f"{str(final)!r} cannot be written: {error}.") from error

    runtime.from_main(write)


def progress(folder: Path) -> dict[str, Any]:
    """How far the run of a checkpoint had come: samples, steps, and what it skipped."""
    return json.loads((folder / store.PROGRESS).read_text(encoding="utf-8"))


def restore(folder: Path, *, engine, scheduler) -> None:
    """Put a checkpoint into a fresh engine of any ZeRO stage <= 2 and any layout.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    done = progress(folder)
    weights, moments = folder / store.WEIGHTS, folder / store.OPTIMIZER
    logical.load_weights(engine.module, store.reader(weights), file=weights)
    logical.load_optimizer(engine, store.reader(moments), done["optimizer_step"], file=moments)
    saved = json.loads((folder / store.SCHEDULER).read_text(encoding="utf-8"))
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


def restore_ranks(folder: Path, parts: Mapping[str, Carried] = NO_PARTS) -> None:
    """Restore this rank's random states and what its parts carry.

    At another number of processes a rank that the saved run did not have keeps its own seed, and
    every part says how its states are dealt out anew. A part that the saved run did not have stays
    as it is.
    """
    saved = torch.load(folder / store.RANKS, weights_only=True)
    rank, world_size = runtime.rank(), runtime.world_size()
    for name, part in parts.items():
        states = [entry["carried"][name] for entry in saved if name in entry["carried"]]
        if len(states) != len(saved):
            continue
        if len(states) == world_size:
            part.load_state_dict(states[rank])
        else:
            part.load_state_dict(part.dealt(states, rank=rank, world_size=world_size))
    if rank < len(saved):
        _set_random_state(saved[rank]["random"])


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


def _set_random_state(saved: dict[str, Any]) -> None:
    kind, keys, *rest = saved["numpy"]
    random.setstate(saved["python"])
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(saved["cuda"])
