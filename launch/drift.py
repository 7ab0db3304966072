"""What differs between a run's newest start and the one that resumes it.

Each difference is one of three: it cannot move the loss curve (noted), it does (refused unless
`--allow_drift true`), or it makes another run of it (refused). Layouts are of the first kind: any
number of processes follows one curve, as long as a step has the same number of samples. Other
shapes of the model are refused by `launch.checks.check_same_model`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm_moe.arguments import (
    DataArguments,
    ModelArguments,
    MoEArguments,
    ObjectiveArguments,
    PromptArguments,
)
from mm_moe.errors import CheckpointError

ANOTHER_RUN = ("dataset", "objective")
_GROUPS = (ModelArguments, MoEArguments, PromptArguments, DataArguments, ObjectiveArguments)
_OF_THE_MODEL = {field.name for kind in _GROUPS for field in dataclasses.fields(kind)}
_NO_MATTER = {  # of those: what is read after training, or follows one curve by construction
    *("validation_split", "test_split", "ep_size", "grad_cache", "moe_backend"),
    *("max_bad_samples", "max_bad_share", "stream_retries", "stream_timeout_s"),
    *("zero_shot_dataset", "zero_shot_data_dir", "zero_shot_options", "zero_shot_templates"),
}
_OF_TRAINING = {
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    *("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("max_grad_norm", "bf16", "fp16", "tf32", "seed", "data_seed", "label_smoothing_factor"),
    *("torch_compile", "full_determinism", "neftune_noise_alpha", "optim_target_modules"),
    *("new_parts_lr_scale", "skip_spikes"),
}
MOVES_THE_CURVE = (_OF_THE_MODEL - _NO_MATTER) | _OF_TRAINING
LENGTH = ("max_steps", "num_train_epochs")
# Together they make the samples of a step, which is compared instead.
BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps", "global_batch_size")
SILENT = ("config", "output_dir", "resume_from_checkpoint", "local_rank", "allow_drift", "run_name")
MISSING = object()


@dataclass(frozen=True)
class Facts:
    """What a start is compared by.

    Attributes:
        flags: recipe and flags before anything is filled in.
        step_samples: of one optimizer step over all processes.
        max_steps: of the schedule.
        others: name -> value of what no flag says: hashes, processes, versions, commit.
    """

    flags: dict[str, Any]
    step_samples: int | None
    max_steps: int | None
    others: dict[str, Any]

    @classmethod
    def of(cls, record: dict[str, Any]) -> Facts:
        """From the content of `run.json`; what it lacks is not compared."""
        arguments = record.get("arguments") or {}
        parts = ("per_device_train_batch_size", "gradient_accumulation_steps")
        sizes: list[Any] = [*(arguments.get(name) for name in parts), record.get("world_size")]
        samples = math.prod(sizes) if all(isinstance(n, int) for n in sizes) else None
        found = {
            "data hash": (record.get("data") or {}).get("sha256"),
            "mask hash": (record.get("missing") or {}).get("mask_sha256"),
            "processes": record.get("world_size"),
            "commit": record.get("commit"),
            "uncommitted changes": record.get("diff_sha256", MISSING),
            "DeepSpeed settings": arguments.get("deepspeed"),
        }
        found |= {f"{name} version": v for name, v in (record.get("versions") or {}).items()}
        known = {key: value for key, value in found.items() if value is not MISSING}
        steps = arguments.get("max_steps")
        return cls(dict(record.get("flags") or {}), samples, steps, known)


@dataclass
class Drift:
    """Differences in words, by what they do.

    Attributes:
        noted: cannot move the curve.
        curve: move it.
        refused: make another run of it.
    """

    noted: list[str] = field(default_factory=list)
    curve: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    @property
    def all(self) -> list[str]:
        """Every difference."""
        return [*self.refused, *self.curve, *self.noted]


def compare(before: Facts, now: Facts, *, step: int) -> Drift:
    """What differs.

    Args:
        before: the newest start of the run.
        now: the start that resumes it.
        step: from which it goes on.
    """
    drift = Drift()
    for name in sorted({*before.flags, *now.flags}) if before.flags and now.flags else ():
        if name in SILENT or name in BATCH or name in LENGTH or name == "deepspeed":
            continue
        was, is_ = before.flags.get(name, MISSING), now.flags.get(name, MISSING)
        if was is MISSING or is_ is MISSING or _same(was, is_):
            continue  # a flag that one of the two releases does not have
        room = drift.noted
        if name in ANOTHER_RUN:
            room = drift.refused
        elif name in MOVES_THE_CURVE:
            room = drift.curve
        room.append(_words(name, was, is_))
    _compare_batch(before, now, drift)
    _compare_length(before, now, drift, step=step)
    for name in before.others.keys() & now.others.keys():
        was, is_ = before.others[name], now.others[name]
        if was != is_ and was is not None:
            room = drift.curve if name in ("data hash", "mask hash") else drift.noted
            room.append(_words(name, _short(was), _short(is_)))
    for room in (drift.noted, drift.curve, drift.refused):
        room.sort()
    return drift


def _compare_batch(before: Facts, now: Facts, drift: Drift) -> None:
    known = None not in (before.step_samples, now.step_samples)
    if known and before.step_samples != now.step_samples:
        words = _words("samples of a step", before.step_samples, now.step_samples)
        drift.curve.append(f"{words} (batch x accumulation x processes)")
        return
    for name in BATCH:
        was, is_ = before.flags.get(name), now.flags.get(name)
        if was != is_ and before.flags:
            drift.noted.append(f"{_words(name, was, is_)} (a step has as many samples)")


def _compare_length(before: Facts, now: Facts, drift: Drift, *, step: int) -> None:
    """A longer run is fine; its schedule is another from here on."""
    was, is_ = before.max_steps, now.max_steps
    if was is None or is_ is None or was == is_:
        return
    words = _words("max_steps", was, is_)
    if is_ < step:
        drift.refused.append(f"{words}, and step {step} is done")
    elif is_ < was:
        drift.curve.append(words)
    elif str(now.flags.get("lr_scheduler_type", "linear")).startswith("constant"):
        drift.noted.append(words)
    else:
        drift.noted.append(f"{words} (the learning rate follows the longer schedule from here)")


def _same(was: Any, is_: Any) -> bool:
    """Equal, or the same JSON in another spelling."""
    if isinstance(was, str) and isinstance(is_, str) and was[:1] == "{" == is_[:1]:
        try:
            return json.loads(was) == json.loads(is_)
        except ValueError:
            return was == is_
    return was == is_


def _words(name: str, was: Any, is_: Any) -> str:
    return f"{name} was {_plain(was)}, is {_plain(is_)}"


def _plain(value: Any) -> str:
    return "unset" if value is None else value if isinstance(value, str) else json.dumps(value)


def _short(value: Any) -> Any:
    """A hash by its first letters; settings by a hash of theirs would say nothing."""
    if isinstance(value, str) and len(value) in (40, 64):
        return value[:12]
    return value if len(str(value)) <= 60 else f"{str(value)[:57]}..."


def settle_drift(drift: Drift, *, run: Path, allowed: bool) -> list[str]:
    """Lines for the user about what differs.

    Args:
        drift: as `compare` found it.
        run: the folder of the run, for the messages.
        allowed: `--allow_drift`.

    Raises:
        CheckpointError: a difference that is refused.
    """
    if drift.refused:
        raise CheckpointError(
            f"{str(run)!r} cannot go on as another run: {'; '.join(drift.refused)}. Start a new "
            "run, or resume with the settings of that one."
        )
    if drift.curve and not allowed:
        raise CheckpointError(
            f"resuming {str(run)!r} with these would move its loss curve: "
            f"{'; '.join(drift.curve)}. Leave them as they were (without --config and flags the "
            "run's own are taken), or say --allow_drift true."
        )
    lines = []
    if drift.curve:
        lines.append(f"  changed, moves the curve (--allow_drift): {'; '.join(drift.curve)}")
    if drift.noted:
        lines.append(f"  changed since the last start: {'; '.join(drift.noted)}")
    return lines
