"""What can be refused of a Slurm job before it is submitted."""

from __future__ import annotations

import argparse
import copy
import re
import tempfile
from pathlib import Path

from launch.checks import AUTO, typed_flags
from launch.cli import RecipeParser
from launch.finish import SECRET_FLAGS
from launch.plan import as_if_launched
from mm_moe.checkpoint import store
from mm_moe.errors import CheckpointError, ConfigError

MINUTE, HOUR, DAY = 60, 3600, 86400
# Slurm's forms of a time limit, and what each of their numbers counts in seconds.
TIME_FORMS = (
    (r"(\d+)", (MINUTE,)),
    (r"(\d+):(\d+)", (MINUTE, 1)),
    (r"(\d+):(\d+):(\d+)", (HOUR, MINUTE, 1)),
    (r"(\d+)-(\d+)", (DAY, HOUR)),
    (r"(\d+)-(\d+):(\d+)", (DAY, HOUR, MINUTE)),
    (r"(\d+)-(\d+):(\d+):(\d+)", (DAY, HOUR, MINUTE, 1)),
)
WORDS = {  # flags that end up in an #SBATCH line, and what they may look like
    "partition": (r"[\w.,-]+", "debug"),
    "account": (r"[\w.-]+", "project7"),
    "job_name": (r"[\w.+-]+", "clip_moe"),
    "mem": (r"\d+[KMGT]?", "64G"),
    "master_addr": (r"[\w.:-]+", "10.0.0.1"),
}
RESUME_WORDS = (None, AUTO, "latest")


def seconds_of(text: str) -> int:
    """A time limit in Slurm's forms, in seconds.

    Raises:
        ConfigError: another form.
    """
    for form, units in TIME_FORMS:
        if match := re.fullmatch(form, text):
            return sum(int(n) * unit for n, unit in zip(match.groups(), units, strict=True))
    raise ConfigError(
        f"--time {text!r} is no time limit of Slurm's; write HOURS:MINUTES:SECONDS such as "
        "04:00:00, or DAYS-HOURS such as 2-12."
    )


def check_job(options: argparse.Namespace) -> None:
    """Refuse numbers and words that no job can have.

    Raises:
        ConfigError: names flag, value and rule.
    """
    least = {"nodes": 1, "gpus_per_node": 0, "processes_per_node": 1, "cpus_per_task": 1}
    for flag, low in (least | {"signal_before_s": 1, "max_requeues": 0}).items():
        value = getattr(options, flag)
        if value is not None and value < low:
            raise ConfigError(f"--{flag} ({value}) must be at least {low}.")
    for flag, (form, example) in WORDS.items():
        value = getattr(options, flag)
        if value is not None and not re.fullmatch(form, value):
            raise ConfigError(f"--{flag} {value!r} cannot be; write one such as {example}.")
    for option in options.sbatch:
        if not re.fullmatch(r"--\S.*", option):
            raise ConfigError(
                f"--sbatch {option!r} must be one option, such as --sbatch=--qos=high."
            )
    if "\n" in (options.setup or ""):
        raise ConfigError("--setup must be one line; join commands with && or ;.")
    limit = seconds_of(options.time)
    if options.signal_before_s >= limit:
        raise ConfigError(
            f"--signal_before_s ({options.signal_before_s}) must be less than --time "
            f"{options.time} ({limit} s), else the job would save before it began."
        )
    gpus, processes = options.gpus_per_node, options.processes_per_node
    if gpus and processes and gpus != processes:
        raise ConfigError(
            f"--processes_per_node ({processes}) must be --gpus_per_node ({gpus}): one process "
            "drives one GPU; leave it out."
        )


def check_words(words: list[str]) -> None:
    """Refuse flags of training that do not go with a job which starts several times.

    Raises:
        ConfigError: a secret, or a checkpoint by name.
    """
    for flag in SECRET_FLAGS:
        if flag in typed_flags(words):
            raise ConfigError(
                f"--{flag} would stand in the job's script for all to read; set HF_TOKEN in the "
                "environment, which sbatch passes on."
            )
    if any(word.split("=")[-1].startswith("hf_") for word in words):
        raise ConfigError(
            "a flag holds what looks like a token of the Hub, for all to read in the job's script; "
            "set HF_TOKEN in the environment, which sbatch passes on."
        )


def check_training(words: list[str], *, world_size: int, per_node: int) -> argparse.Namespace:
    """Refuse what `launch/train.py` would refuse.

    Args:
        words: flags of training.
        world_size: processes of the job.
        per_node: processes of a node.

    Returns:
        The flags as given, with those of the recipe.

    Raises:
        MMMoEError: in training's own words.
    """
    recipe = RecipeParser()
    values = recipe.namespace(words)
    given = copy.deepcopy(values)
    wanted = values.resume_from_checkpoint
    if wanted not in RESUME_WORDS:
        raise ConfigError(
            f"--resume_from_checkpoint {wanted}: a job that is started again would go back to it; "
            "take auto or latest."
        )
    from launch.run import check  # brings DeepSpeed in: not before the flags have been read

    with as_if_launched(world_size=world_size, gpus_per_node=per_node):
        check(values, words)
    # as the planner: nothing of the trainer's own start, which may need the GPUs of the job
    if wanted == "latest" and not store.checkpoints(Path(given.output_dir or "")):
        raise CheckpointError(
            f"{str(given.output_dir)!r} holds no good checkpoint to resume from; take "
            "--resume_from_checkpoint auto, which then starts anew."
        )
    values.deepspeed, values.use_cpu, values.output_dir = None, True, "unused"
    recipe.build(values)
    return given


def check_folder(folder: Path) -> None:
    """Refuse a name that cannot stand in an `#SBATCH` line.

    Raises:
        ConfigError: names it.
    """
    if re.search(r'["\\\n]', str(folder)):
        raise ConfigError(
            f"--output_dir {str(folder)!r}: quotes, backslashes and line ends cannot stand in "
            "Slurm's options; take another name."
        )


def local_place(folder: Path) -> str | None:
    """Why other nodes may not see a folder, in words; None where nothing speaks against it."""
    place = folder.resolve()
    for local in {"/tmp", "/var/tmp", "/dev/shm", tempfile.gettempdir()}:
        if place.is_relative_to(Path(local).resolve()):
            return f"it lies below {local}, which every node has for itself"
    return None
