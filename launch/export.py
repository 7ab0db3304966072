"""Publishes a run: `python launch/export.py RUN --output DIR` and/or `--push_to_hub ORG/NAME`.

`--merge_lora` adds the adapters to the weights that they belong to: the folder then loads without
`peft`, and computes the same.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from launch.cli import ProgramParser, run_program
from mm_moe.checkpoint import hub, store
from mm_moe.errors import CheckpointError, ConfigError
from mm_moe.models.folder import load_model
from mm_moe.models.mismatch import check_folder

# What resumes a run but does not belong into a published model.
RESUME_ONLY = (
    store.OPTIMIZER,
    store.SCHEDULER,
    store.TRAINER_STATE,
    store.MANIFEST,
    "progress.json",
)


def model_folder(run: Path, checkpoint: str | None) -> Path:
    """The folder to publish: `final/`, or a verified `checkpoint-N`.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if checkpoint:
        return store.find(run, str(run / checkpoint) if checkpoint != "latest" else checkpoint)
    final = run / "final"
    if not (final / store.WEIGHTS).is_file():
        raise CheckpointError(
            f"{str(run)!r} has no final/ model; name a checkpoint of it with --checkpoint latest."
        )
    return final


def write_folder(source: Path, output: Path, *, run: Path, merge: bool) -> None:
    """Copy a model without what resumes a run, and write its card where the run is known.

    Args:
        source: the model's folder.
        output: a new or empty folder.
        run: the folder of the run.
        merge: write the model without adapters that computes the same.
    """
    shutil.copytree(
        source,
        output,
        ignore=shutil.ignore_patterns(*RESUME_ONLY, "random-*.pt", *([store.WEIGHTS] * merge)),
        dirs_exist_ok=True,
    )
    if merge:
        model = load_model(source)
        model.merge_lora()
        model.save_pretrained(output)
    if (run / "run.json").is_file():
        scores = run / "scores.json"
        hub.write_card(
            output,
            json.loads((run / "run.json").read_text()),
            json.loads(scores.read_text()) if scores.is_file() else None,
        )


def check_merge(source: Path, output: Path | None) -> None:
    """Refuse to merge what has no adapters, or in the place of the model itself.

    Raises:
        ConfigError: says which, and what to do instead.
    """
    if output is None:
        raise ConfigError("--merge_lora makes another model; say where with --output DIR.")
    fields = json.loads((source / "config.json").read_text())
    if not any(part.get("lora") for part in (fields, *fields.get("members", {}).values())):
        raise ConfigError(f"{str(source)!r} has no LoRA adapters; leave --merge_lora out.")


def main(argv: list[str]) -> int:
    """Copy and push."""
    parser = ProgramParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a folder that launch/train.py wrote")
    parser.add_argument("--output", type=Path, help="write the Hugging Face folder here")
    parser.add_argument("--push_to_hub", metavar="ORG/NAME", help="upload it under this name")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--checkpoint", help="checkpoint-N or latest, instead of final/")
    parser.add_argument(
        "--merge_lora", action="store_true", help="write the model without adapters, into --output"
    )
    options = parser.parse_args(argv)
    if not options.output and not options.push_to_hub:
        raise ConfigError("nothing to do: give --output DIR, --push_to_hub ORG/NAME, or both.")
    if options.push_to_hub:
        hub.check_repo_id(options.push_to_hub)
    source = model_folder(options.run, options.checkpoint)
    target = options.output or source
    taken = options.output and options.output.exists()
    if taken and (not options.output.is_dir() or any(options.output.iterdir())):
        raise ConfigError(f"--output {str(options.output)!r} is not empty; name a new folder.")
    check_folder(source)
    if options.merge_lora:
        check_merge(source, options.output)
    if options.output:
        write_folder(source, options.output, run=options.run, merge=options.merge_lora)
        print(f"model written to {options.output}")
    if options.push_to_hub:
        address = hub.push(target, options.push_to_hub, private=options.private)
        print(f"pushed to {address}")
    return 0


if __name__ == "__main__":
    run_program(main)
