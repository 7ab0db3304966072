"""Reads and checks a `--deepspeed` file before any process group or folder exists."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mm_moe.errors import ConfigError

# DeepSpeed key -> (our flag, how the flag's value is found)
_SHARED_KEYS = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
}

# What a file that does not mention them gets: flags rule, and the optimizer is the trainer's own.
_DEFAULTS = {
    **dict.fromkeys((*_SHARED_KEYS, "train_batch_size"), "auto"),
    "bf16": {"enabled": "auto"},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def read_deepspeed_config(path: str | Path) -> dict[str, Any]:
    """Load a DeepSpeed JSON file, and fill in what it leaves out.

    DeepSpeed has defaults of its own: without `gradient_clipping` it clips at 1.0, whatever
    `--max_grad_norm` says.

    Raises:
        ConfigError: no such file, not JSON (with line and column), or not an object.
    """
    file = Path(path)
    if not file.is_file():
        raise ConfigError(
            f"--deepspeed {str(path)!r} does not exist; take one of ds_configs/zero0.json, "
            "zero1.json, zero2.json, zero2_offload.json."
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        where = (
            f"line {error.lineno}, column {error.colno}: {error.msg}"
            if isinstance(error, json.JSONDecodeError)
            else str(error)
        )
        raise ConfigError(f"--deepspeed {str(path)!r} is not valid JSON: {where}.") from error
    if not isinstance(config, dict):
        raise ConfigError(f"--deepspeed {str(path)!r} must hold a JSON object.")
    return {**_DEFAULTS, **config}


def check_deepspeed_config(
    config: dict[str, Any], flags: dict[str, Any], *, world_size: int
) -> None:
    """Refuse what cannot work, and a value given differently on the command line.

    Args:
        config: the parsed file.
        flags: `TrainingArguments` values by name.
        world_size: number of processes.

    Raises:
        ConfigError: a section that is no object, ZeRO-3, fp16, low precision at ZeRO-0, DeepSpeed's
            own optimizer or scheduler, or two values for one thing; names both and a way out.
    """
    stage = _section(config, "zero_optimization").get("stage", 0)
    if stage not in (0, 1, 2):
        raise ConfigError(
            f"zero_optimization.stage {stage} does not work with DeepSpeed's expert layers; "
            "take ds_configs/zero2.json, or zero2_offload.json when memory is short."
        )
    for key in ("optimizer", "scheduler"):
        if key in config:
            raise ConfigError(
                f"the DeepSpeed file sets {key!r}, which the trainer owns; delete it there and use "
                "--learning_rate, --weight_decay, --lr_scheduler_type, --warmup_steps."
            )
    for key, flag in _SHARED_KEYS.items():
        _must_match(config.get(key, "auto"), flags[flag], key, flag)
    total = flags["per_device_train_batch_size"] * flags["gradient_accumulation_steps"] * world_size
    _must_match(
        config.get("train_batch_size", "auto"),
        total,
        "train_batch_size",
        f"per_device_train_batch_size x gradient_accumulation_steps x {world_size} processes",
    )
    for precision in ("bf16", "fp16"):
        enabled = _section(config, precision).get("enabled", "auto")
        _must_match(enabled, bool(flags[precision]), f"{precision}.enabled", precision)
    if flags["fp16"]:
        raise ConfigError("--fp16 needs loss scaling that is not checkpointed here; take --bf16.")
    if flags["bf16"] and stage == 0:
        raise ConfigError(
            "--bf16 at ZeRO stage 0: DeepSpeed leaves the experts out of the clip norm there, and "
            "its optimizer takes a step before the first one; take ds_configs/zero1.json."
        )


def _section(config: dict[str, Any], key: str) -> dict[str, Any]:
    section = config.get(key, {})
    if not isinstance(section, dict):
        raise ConfigError(
            f"the DeepSpeed file sets {key!r} to {section!r}, which must be an object; "
            "copy it from ds_configs/zero2.json."
        )
    return section


def _must_match(in_file: Any, in_flags: Any, key: str, flag: str) -> None:
    if in_file != "auto" and in_file != in_flags:
        raise ConfigError(
            f"the DeepSpeed file says {key} = {in_file}, the flags say {flag} = {in_flags}; "
            f'set the file\'s value to "auto" or make both equal.'
        )
