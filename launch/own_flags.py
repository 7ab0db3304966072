"""A run that is resumed by its folder alone goes on with its own flags, not with a recipe's.

`--output_dir RUN --resume_from_checkpoint latest` means: this run. So the recipe and the flags that
`RUN/run.json` holds come first, and what is typed now wins over them. With `--config` the command
line is taken as it stands.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.cli import ProgramParser
from launch.manifest import SECRET_FLAGS, read_manifest, without_flags

NOT_KEPT = ("output_dir", "resume_from_checkpoint", "local_rank", "allow_drift", *SECRET_FLAGS)
WORDS = ("latest", "true", "auto")


@dataclass(frozen=True)
class CommandLine:
    """What is parsed.

    Attributes:
        argv: flags; those of the run and those that are typed now.
        recipe: the flags below them; None: of the recipe that `argv` names.
        told: a sentence for the user, if flags came from the run.
    """

    argv: list[str]
    recipe: dict[str, Any] | None = None
    told: str = ""


def complete(argv: list[str]) -> CommandLine:
    """A command line with the run's own flags, where it resumes a run and names no recipe.

    Raises:
        CheckpointError: the run's `run.json` cannot be read.
    """
    folder = resumed_run(argv)
    record = read_manifest(folder) if folder is not None else None
    if folder is None or not record or "--config" in {word.split("=")[0] for word in argv}:
        return CommandLine(argv)
    recipe, command = record.get("recipe"), record.get("command")
    if not isinstance(recipe, dict) or not isinstance(command, list):
        return CommandLine(argv)  # of a release that did not keep them
    typed = tuple(word[2:].split("=")[0].replace("-", "_") for word in argv if word[:2] == "--")
    own = without_flags([str(word) for word in command[1:]], (*NOT_KEPT, *typed))
    return CommandLine(
        [*own, *argv],
        recipe=dict(recipe.get("flags") or {}),
        told=f"goes on with the flags of {folder}/run.json (give --config for others)",
    )


def resumed_run(argv: list[str]) -> Path | None:
    """The folder of the run that a command line resumes, if it resumes one."""
    first = ProgramParser(add_help=False, allow_abbrev=False)
    for flag in ("resume_from_checkpoint", "output_dir"):
        first.add_argument(f"--{flag}", f"--{flag.replace('_', '-')}", default=None)
    known: argparse.Namespace = first.parse_known_args(argv)[0]
    wanted = known.resume_from_checkpoint
    if not wanted:
        return None
    if wanted.lower() in WORDS:
        return Path(known.output_dir) if known.output_dir else None
    return Path(wanted).resolve().parent
