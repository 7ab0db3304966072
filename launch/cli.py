"""Command lines: recipes and flags in, dataclasses out, expected failures in one line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.utils.logging import disable_progress_bar

from mm_moe.arguments import (
    DataArguments,
    ModelArguments,
    MoEArguments,
    ObjectiveArguments,
    PromptArguments,
    RunArguments,
)
from mm_moe.errors import ConfigError, MMMoEError
from mm_moe.registry import nearest
from mm_moe.training.failures import leave

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_RECIPE = "finetune/recipes/emoji_replay.yaml"
RECIPE_FOLDERS = ("finetune/recipes", "pretrain/recipes")
NOISY_LOGGERS = (
    "transformers",
    "datasets",
    "accelerate",
    "DeepSpeed",
    "torch.distributed",
    "torch.utils.cpp_extension",
)
# Flags of older transformers releases that users still type, and what they became.
RENAMED = {
    "warmup_ratio": "warmup_steps",
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
}
OPEN_CLIP = {  # flags of its program
    "train_data": "data_dir (with --dataset webdataset for shards, columns for tables)",
    "val_data": "dataset_options ('validation': a file or pattern)",
    "train_num_samples": "dataset_options ('num_samples')",
    "csv_img_key": "image_column",
    "csv_caption_key": "text_column",
    "aug_cfg": "augment",
    "workers": "dataloader_num_workers",
}


@dataclasses.dataclass
class Settings:
    """Everything a run is made from."""

    model: ModelArguments
    moe: MoEArguments
    prompt: PromptArguments
    data: DataArguments
    run: RunArguments
    objective: ObjectiveArguments
    training: TrainingArguments


class ProgramParser(argparse.ArgumentParser):
    """`ArgumentParser` that raises `ConfigError` instead of printing a usage page."""

    def error(self, message: str) -> NoReturn:
        """Turn argparse's complaint into a `ConfigError`."""
        raise ConfigError(f"{message}; --help lists the flags.")


class RecipeParser(HfArgumentParser):
    """`HfArgumentParser` that raises `ConfigError` instead of printing a usage page."""

    def __init__(self) -> None:
        types = (
            ModelArguments,
            MoEArguments,
            PromptArguments,
            DataArguments,
            RunArguments,
            ObjectiveArguments,
            TrainingArguments,
        )
        super().__init__(types, allow_abbrev=False)  # type: ignore[arg-type]
        for action in self._actions:
            if action.dest == "report_to":
                action.nargs = "+"  # as the library's Python interface has it

    def error(self, message: str) -> None:  # type: ignore[override]
        """Turn argparse's complaint into a `ConfigError`."""
        raise ConfigError(message)

    @property
    def flags(self) -> list[str]:
        """Every flag in snake case."""
        return sorted({action.dest for action in self._actions if action.dest != "help"})

    def namespace(
        self, argv: list[str], *, recipe: dict[str, Any] | None = None
    ) -> argparse.Namespace:
        """Recipe and flags as plain values; nothing is constructed yet.

        Args:
            argv: the command line.
            recipe: flags of the recipe; None reads those of `--config`.

        Raises:
            ConfigError: unknown flag or recipe key (with the nearest names), or a value of the
            wrong
                type.
        """
        first = ProgramParser(add_help=False, allow_abbrev=False)
        first.add_argument("--config", default=DEFAULT_RECIPE)
        recipe_path = first.parse_known_args(argv)[0].config
        recipe = dict(read_recipe(recipe_path) if recipe is None else recipe)
        for key in recipe:
            if key not in self.flags:
                raise ConfigError(
                    f"recipe {recipe_path!r} sets {key!r}, which is no flag; "
                    f"{nearest(key, self.flags)}"
                )
        for part in ("prompt", "fill"):
            if _names_another(part, argv, recipe):
                recipe.pop(f"{part}_config", None)  # the options of the recipe's own one
        namespace, unknown = self.parse_known_args(recipe_argv(recipe) + argv)
        for word in unknown:
            self._refuse(word)
        namespace.config = recipe_path
        return namespace

    def _refuse(self, word: str) -> None:
        if not word.startswith("--"):
            raise ConfigError(f"{word!r} is no flag; flags start with -- and take one value.")
        name = word[2:].split("=")[0].replace("-", "_")
        if name in OPEN_CLIP:
            hint = f"what open_clip calls so is --{OPEN_CLIP[name]} here."
        else:
            hint = f"it is --{RENAMED[name]} now." if name in RENAMED else nearest(name, self.flags)
        raise ConfigError(f"unknown flag {word.split('=')[0]!r}; {hint}")

    def build(self, namespace: argparse.Namespace) -> Settings:
        """Construct the dataclasses.

        Raises:
            ConfigError: `TrainingArguments` refuses a combination.
        """
        parts = []
        for kind in self.dataclass_types:
            names = [field.name for field in dataclasses.fields(kind) if field.init]
            try:
                parts.append(kind(**{name: getattr(namespace, name) for name in names}))
            except (ValueError, TypeError) as error:
                raise ConfigError(str(error)) from error
        return Settings(*parts)


def _names_another(part: str, argv: list[str], recipe: dict[str, Any]) -> bool:
    """Whether a part (`--prompt`) is typed, and is not the one that the recipe sets."""
    first = ProgramParser(add_help=False, allow_abbrev=False)
    first.add_argument(f"--{part}")
    typed = getattr(first.parse_known_args(argv)[0], part)
    return typed is not None and recipe.get(part, typed) != typed


def find_recipe(name: str) -> Path:
    """A recipe's file: as given, below the project, or by its bare name.

    Raises:
        ConfigError: no such recipe; lists the nearest.
    """
    tried = [Path(name), ROOT / name]
    tried += [ROOT / folder / f"{name}.yaml" for folder in RECIPE_FOLDERS]
    for path in tried:
        if path.is_file():
            return path
    known = [
        f"{folder}/{file.name}"
        for folder in RECIPE_FOLDERS
        for file in (ROOT / folder).glob("*.yaml")
    ]
    raise ConfigError(f"unknown recipe {name!r}; {nearest(name, known)}")


def read_recipe(name: str) -> dict[str, Any]:
    """Read a recipe's flags.

    Raises:
        ConfigError: unknown recipe, YAML that does not parse (line and column), or no mapping.
    """
    path = find_recipe(name)
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"recipe {name!r} is not valid YAML{where}.") from error
    if not isinstance(recipe, dict):
        raise ConfigError(f"recipe {name!r} must be a mapping of flags to values.")
    return recipe


def recipe_argv(recipe: dict[str, Any]) -> list[str]:
    """A recipe as command-line words, so that recipe and flags share one parser and its checks."""
    words: list[str] = []
    for key, value in recipe.items():
        if value is None:
            continue
        if isinstance(value, list):
            words += [f"--{key}", *map(str, value)]
        elif isinstance(value, dict):
            words += [f"--{key}", json.dumps(value)]
        else:
            words += [f"--{key}", str(value).lower() if isinstance(value, bool) else str(value)]
    return words


def quiet() -> None:
    """Keep third-party chatter out of the terminal; our own messages stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns while it guesses
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    disable_progress_bar()  # the library's own bars for writing files
    warnings.filterwarnings("ignore", message="OMP_NUM_THREADS")
    logging.getLogger("mm_moe").setLevel(logging.INFO)


def tell(line: str) -> None:
    """Say what a user should know and the program gets along with."""
    print(f"warning: {line}", file=sys.stderr, flush=True)


def run_program(main: Callable[[list[str]], int]) -> None:
    """Run a program's `main`; an expected failure prints one line and exits with its own status."""
    quiet()
    try:
        status = main(sys.argv[1:])
    except MMMoEError as error:
        # All ranks meet a wrong setting: one voice is enough. Bad data one rank may meet alone.
        running = dist.is_initialized() and dist.get_world_size() > 1
        speaks = os.environ.get("RANK", "0") == "0" or error.every_rank
        if speaks:
            line = "\n" if running else ""  # the progress line stands open
            print(f"{line}{error.heading}: {error}", file=sys.stderr, flush=True)
        status = error.exit_code
        if running:
            leave(status, speaks_first=speaks)  # no peer may come to a common end
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)
