"""What can be refused before any process group, folder or model exists."""

from __future__ import annotations

import argparse
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.cli import ROOT
from launch.held_out import split_in_training
from launch.manifest import RUN_FILE, run_id
from launch.zero_shot import as_objective_sees
from mm_moe.arguments import COLUMN_FLAGS, STREAM_FLAGS, dataset_options, parse_json
from mm_moe.checkpoint import store
from mm_moe.data.augment import Augment
from mm_moe.data.missing import MissingProtocol, kinds_for
from mm_moe.data.schema import DataSource
from mm_moe.errors import CheckpointError, ConfigError, DataError
from mm_moe.models.folder import config_of, is_own
from mm_moe.registry import BACKBONES, DATASETS, OBJECTIVES, PROMPTS, ROUTERS
from mm_moe.training import runtime
from mm_moe.training.deepspeed_config import check_deepspeed_config, read_deepspeed_config

DEFAULT_DEEPSPEED = "ds_configs/zero2.json"
AUTO = "auto"  # --resume_from_checkpoint: go on if there is something, else start
OURS = ".mm_moe-"  # a lock, or a probe of whether a folder can be written to
WRITTEN_BY_THE_LIBRARY = ("transformers_version", "_name_or_path", "architectures", "dtype")
MOST_WORDS = 300  # of one setting in a message
ROWS_READ = 100_000  # of each split, before training; about 0.1 ms a row


def check_names(values: argparse.Namespace) -> None:
    """Refuse names that no registry knows, with the nearest ones.

    Raises:
        ConfigError: an unknown backbone, prompt, router, data set or objective.
    """
    BACKBONES.check(values.backbone)
    DATASETS.check(values.dataset)
    OBJECTIVES.check(values.objective)
    ROUTERS.check(values.router)
    for prompt in [values.prompt, *values.compare_with]:
        PROMPTS.check(prompt)


def check_json(values: argparse.Namespace) -> None:
    """Refuse flags that should hold a JSON object and do not.

    Raises:
        ConfigError: names flag, line and column; or the setting of --augment that cannot be.
    """
    for flag in (
        "backbone_config",
        "fusion_config",
        "members_config",
        "model_config",
        "moe_config",
        "prompt_config",
        "dataset_options",
        "augment",
        "interaction_config",
        "objective_config",
        "fill_config",
    ):
        parse_json(flag, getattr(values, flag))
    Augment.of(parse_json("augment", values.augment))


def deepspeed_settings(values: argparse.Namespace) -> dict[str, Any]:
    """The checked DeepSpeed settings of the run; without `--deepspeed`, the shipped ZeRO-2 ones.

    Raises:
        ConfigError: missing or malformed file, or settings that cannot work.
    """
    path = values.deepspeed or str(ROOT / DEFAULT_DEEPSPEED)
    if not Path(path).is_file() and (ROOT / path).is_file():
        path = str(ROOT / path)  # the README's relative path, from any working directory
    config = read_deepspeed_config(path)
    check_deepspeed_config(config, vars(values), world_size=runtime.world_size())
    return config


def typed_flags(argv: list[str]) -> set[str]:
    """The flags that were typed by hand, in snake case."""
    words = [word for word in argv if word.startswith("--")]
    return {word.split("=")[0].lstrip("-").replace("-", "_") for word in words}


def settle_batch(values: argparse.Namespace, argv: list[str]) -> None:
    """Derive the batch per process from `--global_batch_size`; a flag typed by hand beats a recipe.

    Raises:
        ConfigError: the global batch does not divide, or two typed flags contradict each other.
    """
    typed = typed_flags(argv)
    own = "per_device_train_batch_size" in typed
    if not values.global_batch_size or (own and "global_batch_size" not in typed):
        return
    parts = runtime.world_size() * values.gradient_accumulation_steps
    if values.global_batch_size % parts:
        raise ConfigError(
            f"--global_batch_size ({values.global_batch_size}) must be a multiple of processes x "
            f"accumulation ({parts}); try {values.global_batch_size // parts * parts or parts}."
        )
    share = values.global_batch_size // parts
    if own and values.per_device_train_batch_size != share:
        raise ConfigError(
            f"--global_batch_size {values.global_batch_size} over {parts} gives {share} per "
            f"process, --per_device_train_batch_size says {values.per_device_train_batch_size}; "
            "drop one."
        )
    values.per_device_train_batch_size = share


def open_source(values: argparse.Namespace) -> DataSource:
    """The data set, with every split that the run needs.

    Raises:
        ConfigError: a missing split or modality, named with those that exist.
        DataError: the data set itself is not in order, or a label is outside the classes.
    """
    options = dataset_options(vars(values))
    try:
        source = DATASETS.resolve(values.dataset)(values.data_dir, **options)
    except TypeError as error:
        for flags, kind in ((COLUMN_FLAGS, "Column"), (STREAM_FLAGS, "Stream")):
            for flag in flags:
                if f"{flag!r}" in str(error):
                    raise ConfigError(
                        f"--{flag} does not go with --dataset {values.dataset!r}; leave it out. "
                        f"{kind} flags are for --dataset columns."
                    ) from error
        raise ConfigError(f"--dataset_options for {values.dataset!r}: {error}.") from error
    source = as_objective_sees(source, values.objective)
    needed = [values.train_split]
    if values.eval_strategy != "no":
        needed.append(split_in_training(values, source))
    if values.final_evaluation and source.problem_type != "none":
        needed.append(values.test_split)
    for split in needed:
        if split not in source.splits():
            raise ConfigError(
                f"data set {values.dataset!r} has no split {split!r}; "
                f"it has {', '.join(source.splits())}."
            )
        if split in source.unlabelled:
            raise DataError(
                f"split {split!r} of {source.name!r} cannot be trained on or scored: "
                f"{source.unlabelled[split]}."
            )
    check_missing_type(values.missing_type, source)
    if not 0.0 <= values.missing_ratio <= 1.0:
        raise ConfigError(
            f"--missing_ratio {values.missing_ratio} must lie in [0, 1]: the share of samples that "
            "lack something."
        )
    for split in needed:
        _read_labels(source, split)
    return source


def check_missing_type(kind: str, source: DataSource) -> None:
    """Refuse a missing type that does not fit the data's modalities.

    Raises:
        ConfigError: lists those that do.
    """
    protocol = MissingProtocol(dataset=source.name, split="train", kind=kind)
    try:
        protocol.check_kind(source.modalities)
    except ConfigError as error:
        raise ConfigError(
            f"--missing_type {kind!r} does not fit the data; take one of "
            f"{', '.join(kinds_for(source.modalities))}, or several modalities joined by +."
        ) from error


def _read_labels(source: DataSource, split: str) -> None:
    """Find a label outside the classes now, on every rank alike, and not in the middle of a run.

    Data that stream from elsewhere, and rows beyond `ROWS_READ`, are checked when they come.
    """
    if source.problem_type != "none" and source.size(split) is not None:
        for _ in itertools.islice(source.index(split), ROWS_READ):
            pass


def resume_point(
    values: argparse.Namespace, *, tell: Callable[[str], None] = lambda line: None
) -> Path | None:
    """The checkpoint to resume, found and verified; sets `output_dir` from it where not given.

    "auto" starts anew where the run has no checkpoint yet, so that one command line serves a job's
    first start and every later one. Checkpoints that are all damaged are not taken for none.

    Args:
        values: the flags.
        tell: is given a line for every damaged checkpoint that is passed over.

    Raises:
        CheckpointError: nothing good to resume from.
    """
    wanted = values.resume_from_checkpoint
    if not wanted:
        return None
    if wanted.lower() in ("latest", "true", AUTO):
        if not values.output_dir:
            raise CheckpointError(
                f"--resume_from_checkpoint {wanted} needs --output_dir, the folder of the run."
            )
        folder = Path(values.output_dir)
        if wanted.lower() == AUTO and not store.checkpoints(folder):
            return None
        return store.find(folder, "latest", tell=tell, run_id=run_id(folder), needed=store.RESUMED)
    own = Path(wanted).resolve().parent
    if not values.output_dir:
        values.output_dir = str(own)
    return store.find(own, wanted, run_id=run_id(own), needed=store.RESUMED)


def check_output(values: argparse.Namespace, *, resume: Path | None) -> None:
    """Refuse to write over another run; the run that is resumed may go on in its own folder.

    Raises:
        ConfigError: the folder holds something already.
    """
    if not values.output_dir:
        return
    folder = Path(values.output_dir)
    if resume is not None and resume.resolve().parent == folder.resolve():
        return
    again = (values.resume_from_checkpoint or "").lower() == AUTO
    if again and any((folder / name).exists() for name in (RUN_FILE, f"{RUN_FILE}.tmp")):
        return  # a run that was stopped before its first checkpoint starts again
    if folder.exists() and (not folder.is_dir() or _anything(folder)):
        what = "another run" if (folder / RUN_FILE).exists() else "files"
        raise ConfigError(
            f"--output_dir {str(folder)!r} already holds {what}; name a new folder, or "
            f"resume it with --output_dir {folder} --resume_from_checkpoint latest."
        )


def _anything(folder: Path) -> bool:
    """Whether a folder holds more than what a process left that was killed before it began."""
    return any(not path.name.startswith(OURS) for path in folder.iterdir())


def check_same_model(resume: Path, config: dict[str, Any]) -> None:
    """Refuse to resume into another model.

    Args:
        resume: a verified checkpoint.
        config: the model configuration of this run, as a plain dict.

    Raises:
        CheckpointError: lists the settings that differ.
    """
    stored = json.loads((resume / "config.json").read_text())
    saved, ours = _settings_of(stored), _settings_of(config)
    differing = [
        f"{key} was {_shown(saved.get(key))}, is {_shown(ours.get(key))}"
        for key in {**saved, **ours}
        if saved.get(key) != ours.get(key)
    ]
    if differing:
        raise CheckpointError(
            f"{str(resume)!r} belongs to another model: {'; '.join(differing)}. "
            "Resume with the settings of that run."
        )


def _shown(value: Any) -> str:
    """A setting in words; a list of thousands of genes by its beginning."""
    words = repr(value)
    return words if len(words) <= MOST_WORDS else f"{words[:MOST_WORDS]}..."


def _settings_of(fields: dict[str, Any]) -> dict[str, Any]:
    """What makes a model the one it is, as JSON has it; of members under "<member>: <setting>"."""
    full = config_of(fields).to_dict()  # fields newer than a checkpoint have defaults
    keys = ["backbone", "backbone_config", "modalities", "moe", "moe_layers", "moe_mode"]
    keys += ["moe_every", "lora", "prompt", "prompt_config", "num_labels", "problem_type"]
    keys += ["fusion", "fusion_rank", "fusion_size", "head_hidden_size", "feature_norm"]
    keys += ["fusion_options", "combine", "frozen", "pad_text", "fill", "fill_config"]
    if is_own(fields):
        keys = [key for key in full if key not in WRITTEN_BY_THE_LIBRARY]
    found = {key: full[key] for key in keys if key in full}
    for key in ("moe", "backbone_config"):  # by single settings, so that one that differs is named
        parts = found.pop(key, None)
        found |= {f"{key}.{name}": part for name, part in (parts or {}).items()}
    for name, own in full.get("members", {}).items():
        found |= {f"{name}: {key}": value for key, value in _settings_of(own).items()}
    return json.loads(json.dumps(found))


def check_supported(values: argparse.Namespace) -> None:
    """Refuse flags of the library that are not honoured here, and weights that are not there.

    Raises:
        ConfigError: names the flag and what to do instead.
    """
    if values.load_best_model_at_end:
        raise ConfigError(
            "--load_best_model_at_end is not supported; publish a checkpoint of your choice with "
            "launch/export.py RUN --checkpoint checkpoint-N."
        )
    _check_recompute(values)
    name = values.pretrained or ""
    looks_like_path = name.endswith((".safetensors", ".bin", ".pt")) or name.startswith(
        (".", "/", "~")
    )
    if looks_like_path and not Path(name).expanduser().exists():
        raise ConfigError(
            f"--pretrained {name!r} does not exist; give a file or folder that does, a Hub name, "
            "builtin or none."
        )


def _check_recompute(values: argparse.Namespace) -> None:
    """Refuse options of activation checkpointing that the models do not honour."""
    for flag in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
        given = getattr(values, flag)
        options = parse_json(flag, given) if isinstance(given, str) else given or {}
        every = options.get("every_n_layers", 1)
        if not (isinstance(every, int) and every >= 1) or set(options) - {"every_n_layers"}:
            raise ConfigError(
                f"--{flag} {json.dumps(options)}: only every_n_layers, a whole number from 1, is "
                "supported; write '{\"every_n_layers\": 2}' or leave it out."
            )


def in_range(values: argparse.Namespace) -> None:
    """Refuse numbers that no run can have.

    Raises:
        ConfigError: names flag, value and rule.
    """
    least = {
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "global_batch_size": 0,
        "top_k_experts": 1,
        "ep_size": 0,
        "shuffle_buffer": 0,
        "max_bad_samples": 0,
        "max_bad_share": 0,
        "learning_rate": 0,
        "max_grad_norm": 0,
        "hang_timeout_s": 0,
        "rendezvous_timeout_s": 1,
    }
    for flag, low in least.items():
        if not getattr(values, flag) >= low:  # so that NaN is refused too
            raise ConfigError(f"--{flag} {getattr(values, flag)} must be at least {low}.")
    cores = os.cpu_count() or 1
    if values.dataloader_num_workers < 0:
        raise ConfigError(
            f"--dataloader_num_workers {values.dataloader_num_workers} must be 0 to {cores}."
        )
