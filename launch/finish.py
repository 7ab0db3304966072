"""The end of a run: scores per missing pattern, table, pictures, report, and what to do next."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
from pathlib import Path
from typing import Any

from eval.card import card_of_run
from eval.patterns import TABLE, ConditionScore, scores_document
from eval.report import format_table, write_report
from eval.zero_shot import ZeroShotRow
from launch.assemble import Run
from launch.cli import Settings
from launch.manifest import (
    SECRET_FLAGS,
    hardware,
    package_versions,
    read_manifest,
    settings_without_secrets,
    source_state,
    without_flags,
    without_secrets,
    without_url_secrets,
    write_manifest,
)
from launch.scoring import train_prior
from launch.tables import describe_tables, mask_keys
from launch.zero_shot import has_pairs, scored_split, write_rows
from mm_moe.checkpoint import store
from mm_moe.data.table import MissingTable
from mm_moe.models.composed_configuration import ComposedConfig
from mm_moe.models.own import OwnModel
from mm_moe.training import runtime, slurm


def arguments_of(run: Run) -> dict[str, Any]:
    """Every argument of the run as plain JSON values; secrets are left out."""
    settings = run.settings
    merged = settings.training.to_sanitized_dict()
    for part in (
        settings.model,
        settings.moe,
        settings.prompt,
        settings.data,
        settings.run,
        settings.objective,
    ):
        merged.update(dataclasses.asdict(part))
    return settings_without_secrets(merged)


def resume_command(
    settings: Settings, folder: Path, argv: list[str], *, word: str = "latest"
) -> str:
    """The line that goes on with this run: its own flags, and where its checkpoints are."""
    replaced = ("local_rank", "output_dir", "resume_from_checkpoint", *SECRET_FLAGS)
    words = without_flags(argv, replaced)
    if not any(word.split("=")[0] == "--deepspeed" for word in words):
        words = ["--deepspeed", "ds_configs/zero2.json", *words]
    world = settings.training.world_size
    alone = ["deepspeed"] if world == 1 else ["deepspeed", "--num_accelerators", str(world)]
    words = list(map(without_url_secrets, words))
    words += ["--output_dir", str(folder), "--resume_from_checkpoint", word]
    return shlex.join([*(slurm.launcher() or alone), "launch/train.py", *words])


def how_to_go_on(settings: Settings, folder: Path, argv: list[str]) -> str:
    """What a stopped run says on its last line: what was saved, and the command that goes on."""
    saved = store.last_saved(folder)
    if saved is not None:
        command = resume_command(settings, folder, without_secrets(argv))
        return f"Saved {saved.name}. Go on with: {command}"
    command = resume_command(settings, folder, without_secrets(argv), word="auto")
    return f"There was nothing to save. Start again with: {command}"


def plan_command(argv: list[str]) -> str:
    """The line that shows what a run with these flags needs."""
    dropped = ("local_rank", "output_dir", "resume_from_checkpoint")
    words = without_flags(without_secrets(argv), dropped)
    world = str(runtime.world_size())
    return shlex.join(["python", "launch/plan.py", "--world_size", world, *words])


def next_commands(run: Run, folder: Path, argv: list[str]) -> dict[str, str]:
    """The lines that resume, evaluate and publish this run."""
    place = shlex.quote(str(folder))
    commands = {"resume": resume_command(run.settings, folder, argv)}
    if run.source.problem_type != "none" or has_pairs(run.source):
        commands["evaluate"] = f"python launch/evaluate_run.py {place}"
    commands["push"] = f"python launch/export.py {place} --push_to_hub ORG/NAME"
    return commands


def missing_record(run: Run) -> dict[str, Any]:
    """The training mask in words and as a hash over all ids of the split, and stored tables."""
    data, missing = run.settings.data, run.train_missing
    record: dict[str, Any] = {
        "kind": data.missing_type,
        "ratio": data.missing_ratio,
        "seed": data.missing_seed,
        "words": missing.describe(run.source.modalities),
    }
    if run.scorer.tables:
        record["tables"] = describe_tables(run.scorer.tables)
    if isinstance(missing, MissingTable):
        record |= {"kind": TABLE, "ratio": None, "seed": None, "mask_sha256": missing.table_hash()}
    elif run.source.size(data.train_split) is not None:
        keys = mask_keys(run.source, data.train_split)
        record["mask_sha256"] = missing.table_hash(keys, run.source.modalities)
    return record


def run_record(run: Run, folder: Path, argv: list[str]) -> dict[str, Any]:
    """What `run.json` says: arguments, versions, data and mask hashes, code, next commands."""
    config = json.dumps(run.model.config.to_dict(), sort_keys=True, default=str)
    return {
        "command": ["launch/train.py", *without_secrets(argv)],
        "arguments": arguments_of(run),
        "versions": package_versions(),
        **source_state(),
        "hardware": hardware(),
        "data": {
            "name": run.source.name,
            "sha256": run.source.fingerprint(),
            "license": run.source.license,
            "task": run.source.task or run.source.problem_type,
            "sizes": {split: run.source.size(split) for split in run.source.splits()},
            "left_out": dict(run.source.left_out),
            "trained_on": run.train_source.size(run.settings.data.train_split),
        },
        "missing": missing_record(run),
        "model_sha256": hashlib.sha256(config.encode()).hexdigest(),
        "world_size": run.settings.training.world_size,
        "ep_size": run.settings.moe.ep_size,
        "commands": next_commands(run, folder, argv),
        "bad_samples": run.scorer.bad_ids,
        "stream_retries": run.stream_retries,
    }


def finish_run(run: Run, others: list[Run], folder: Path, argv: list[str]) -> None:
    """Score, write `scores.json`, `report.html` and pictures, and print table and next steps."""
    models: dict[str, list[ConditionScore]] = {}
    if run.settings.run.final_evaluation and run.source.problem_type != "none":
        data = run.settings.data
        prior = train_prior(run.source, data.train_split)
        for entry in (run, *others):
            models[_title(entry)] = entry.scorer.score(
                prior=prior,
                split=data.test_split,
                ratio=data.missing_ratio,
                seed=data.missing_seed,
            )
    zero_shot = zero_shot_scores(run)
    if not runtime.is_main():
        return
    met = {"bad_samples": run.scorer.bad_ids, "stream_retries": run.stream_retries}
    write_manifest(folder, {**(read_manifest(folder) or {}), **met})
    print()
    if zero_shot is not None:
        pretrained = str(run.settings.model.pretrained or "none")
        write_rows(zero_shot[1], folder, split=zero_shot[0], pretrained=pretrained)
    if models:
        load = {name: rows.tolist() for name, rows in run.trainer.meter.total_load.items()}
        document = scores_document(models, expert_load=load)
        (folder / "scores.json").write_text(json.dumps(document, indent=1))
        print(format_table(document))
    if bad := run.scorer.bad_ids:
        print(f"{len(bad)} sample(s) did not decode: {', '.join(bad[:5])}")
    report = write_report(folder)
    card_of_run(folder, folder / "final")
    print(f"run: {folder}\nreport and pictures: {report}")
    for what, command in next_commands(run, folder, argv).items():
        print(f"{what + ':':<10}{command}")


def zero_shot_scores(run: Run) -> tuple[str, list[ZeroShotRow]] | None:
    """The split and scores of a model without task labels, if there is anything to score."""
    if not (run.settings.run.final_evaluation and has_pairs(run.source)):
        return None
    data = run.settings.data
    split = scored_split(run.source, data.test_split, data.validation_split)
    return None if split is None else (split, run.zero_shot().rows(split))


def _title(run: Run) -> str:
    config = run.model.config
    if isinstance(run.model, OwnModel):
        return str(config.model_type)
    if isinstance(config, ComposedConfig):
        return f"{config.combine} of {', '.join(config.experts)}"
    return "no prompts" if run.model.config.prompt == "none" else run.model.config.prompt
