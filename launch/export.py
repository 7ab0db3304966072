"""Publishes a run: `python launch/export.py RUN --output DIR` and/or `--push_to_hub ORG/NAME`.

`--merge_lora` adds the adapters to the weights that they belong to: the folder then loads without
`peft`, and computes the same. A push that does not work ends with status 2; `RUN/push.json` says
how the newest push ended.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from eval.card import card_of_run
from launch.check_hub import token_for_export
from launch.cli import ProgramParser, run_program, tell
from launch.pushing import result_line
from mm_moe.checkpoint import hub, store
from mm_moe.checkpoint.hub import PUSHED, HubTarget
from mm_moe.checkpoint.hub_queue import PushRecord
from mm_moe.checkpoint.hub_stage import RESUME_ONLY, stage
from mm_moe.errors import CheckpointError, ConfigError
from mm_moe.models.folder import load_model
from mm_moe.models.mismatch import check_folder
from mm_moe.models.shards import SHARD_SIZE, check_size, has_weights, write_shards

WEIGHTS_OF_ANY_SHARDING = "model*.safetensors*"


def model_folder(run: Path, checkpoint: str | None) -> Path:
    """The folder to publish: `final/`, or a verified `checkpoint-N`.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    if checkpoint:
        if Path(checkpoint).name != checkpoint:
            raise ConfigError(
                f"--checkpoint {checkpoint!r} must be latest or a checkpoint-N of {str(run)!r}."
            )
        wanted = checkpoint if checkpoint == "latest" else str(run / checkpoint)
        return store.find(run, wanted, tell=tell)
    final = run / "final"
    if not has_weights(final):
        raise CheckpointError(
            f"{str(run)!r} has no final/ model; name a checkpoint of it with --checkpoint latest."
        )
    return final


def write_folder(
    source: Path,
    output: Path,
    *,
    run: Path,
    merge: bool,
    max_shard_size: str | None = None,
    link: bool = False,
) -> None:
    """Write a model without what resumes a run, and its card where the run is known.

    Args:
        source: the model's folder.
        output: a new or empty folder.
        run: the folder of the run.
        merge: write the model without adapters that computes the same.
        max_shard_size: spread the weights anew over files of at most this size.
        link: take hard links where possible, for a folder that nobody writes into.
    """
    leave_out = WEIGHTS_OF_ANY_SHARDING if merge or max_shard_size else ""
    if link:
        stage(source, output, leave_out=leave_out)
    else:
        unwanted = [*RESUME_ONLY, *filter(None, [leave_out])]
        ignore = shutil.ignore_patterns(*unwanted)
        shutil.copytree(source, output, ignore=ignore, dirs_exist_ok=True)
    if merge:
        model = load_model(source)
        model.merge_lora()
        model.save_pretrained(output, max_shard_size=max_shard_size or SHARD_SIZE)
    elif max_shard_size:
        write_shards(source, output, max_shard_size=max_shard_size)
    card_of_run(run, output, evaluated=source.name == "final")


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


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line.

    Raises:
        ConfigError: nothing to do, or a value that cannot be.
    """
    parser = ProgramParser(description=__doc__)
    parser.add_argument("run", type=Path, help="a folder that launch/train.py wrote")
    parser.add_argument("--output", type=Path, help="write the Hugging Face folder here")
    parser.add_argument("--push_to_hub", metavar="ORG/NAME", help="upload it under this name")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--hub_revision", help="the branch to push to (default: main)")
    parser.add_argument("--hub_timeout_s", type=float, default=hub.TIMEOUT_S)
    parser.add_argument("--checkpoint", help="checkpoint-N or latest, instead of final/")
    parser.add_argument("--max_shard_size", help="largest file of weights, such as 5GB")
    parser.add_argument(
        "--merge_lora", action="store_true", help="write the model without adapters, into --output"
    )
    options = parser.parse_args(argv)
    if not options.output and not options.push_to_hub:
        raise ConfigError("nothing to do: give --output DIR, --push_to_hub ORG/NAME, or both.")
    if options.max_shard_size:
        options.max_shard_size = check_size("max_shard_size", options.max_shard_size)
    if not options.hub_timeout_s > 0:
        raise ConfigError(f"--hub_timeout_s {options.hub_timeout_s} must be above 0 seconds.")
    if options.push_to_hub:
        hub.check_repo_id(options.push_to_hub)
    return options


def push(folder: Path, options: argparse.Namespace, *, token: str) -> None:
    """Push a folder and note in the run how it ended.

    Raises:
        CheckpointError: it did not work.
    """
    target = HubTarget(
        options.push_to_hub,
        token=token,
        private=options.private or None,
        revision=options.hub_revision,
        timeout_s=options.hub_timeout_s,
    )
    record = PushRecord(options.run, target)
    result = hub.push(folder, target, message="Upload by launch/export.py")
    record.write(step=None, result=result)
    if result.state != PUSHED:
        what = "was refused" if result.state == hub.REFUSED else "failed"
        raise CheckpointError(
            f"the push to {target.repo_id} {what}: {result.reason}. The model is as it was in "
            f"{options.run}; give the same command again."
        )
    print(result_line(result, target.repo_id, run_dir=options.run))


def main(argv: list[str]) -> int:
    """Copy and push."""
    options = parse(argv)
    source = model_folder(options.run, options.checkpoint)
    taken = options.output and options.output.exists()
    if taken and (not options.output.is_dir() or any(options.output.iterdir())):
        raise ConfigError(f"--output {str(options.output)!r} is not empty; name a new folder.")
    if options.output and any(place.is_file() for place in options.output.parents):
        raise ConfigError(f"--output {str(options.output)!r} lies in a file; name another folder.")
    check_folder(source)
    if options.merge_lora:
        check_merge(source, options.output)
    token = token_for_export(None) if options.push_to_hub else ""
    how = {"run": options.run, "merge": options.merge_lora}
    if options.output:
        write_folder(source, options.output, max_shard_size=options.max_shard_size, **how)
        print(f"model written to {options.output}")
        if options.push_to_hub:
            push(options.output, options, token=token)
        return 0
    with tempfile.TemporaryDirectory(prefix=".pushing-", dir=options.run) as aside:
        folder = Path(aside) / "model"
        write_folder(source, folder, max_shard_size=options.max_shard_size, link=True, **how)
        push(folder, options, token=token)
    return 0


if __name__ == "__main__":
    run_program(main)
