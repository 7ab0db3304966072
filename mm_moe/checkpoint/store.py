"""Checkpoints on disk: written aside, summed, published by rename, checked before they are read.

A checkpoint folder is a Hugging Face model folder (config, safetensors, processor) with the state
to resume beside it: `optimizer.safetensors`, `scheduler.json`, `trainer_state.json`,
`random-RANK.pt`, and `manifest.json`, which lists every other file with its size and SHA-256.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mm_moe.errors import CheckpointError
from mm_moe.models.shards import WEIGHTS, has_weights, tensor_places

MANIFEST = "manifest.json"
OPTIMIZER = "optimizer.safetensors"
SCHEDULER = "scheduler.json"
TRAINER_STATE = "trainer_state.json"
_NAME = re.compile(r"checkpoint-(\d+)")


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_manifest(folder: Path, step: int) -> None:
    """List every file of `folder` with size and SHA-256, and flush them to disk."""
    files = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
        relative = file.relative_to(folder).as_posix()
        files[relative] = {"bytes": file.stat().st_size, "sha256": _digest(file)}
    (folder / MANIFEST).write_text(
        json.dumps({"format": 1, "step": step, "files": files}, indent=1)
    )


def publish(aside: Path, final: Path) -> None:
    """Rename a complete folder into place; an older folder of that name is replaced."""
    if final.exists():
        shutil.rmtree(final)
    os.replace(aside, final)


def verify(folder: Path) -> int:
    """Check a checkpoint against its manifest and return its step.

    Raises:
        CheckpointError: the folder, its manifest or a file of it is missing, truncated or altered.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"checkpoint {str(folder)!r} does not exist; name a checkpoint-N folder of a run, or "
            "latest."
        )
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        step, files = int(manifest["step"]), dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint {str(folder)!r} is incomplete: no readable {MANIFEST}; "
            "resume from an earlier checkpoint-N."
        ) from error
    for name, entry in files.items():
        file = folder / name
        if not file.is_file():
            raise CheckpointError(
                f"checkpoint {str(folder)!r} is incomplete: {name} is missing; "
                "resume from an earlier checkpoint-N."
            )
        if file.stat().st_size != entry["bytes"] or _digest(file) != entry["sha256"]:
            raise CheckpointError(
                f"checkpoint {str(folder)!r} is damaged: {name} differs from its manifest; "
                "resume from an earlier checkpoint-N."
            )
    return step


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest step first."""
    found = [path for path in run_dir.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def find(run_dir: Path, wanted: str) -> Path:
    """The checkpoint that `--resume_from_checkpoint` means.

    Args:
        run_dir: the run's folder.
        wanted: a checkpoint folder, or "latest"/"true" for the newest good one of the run.

    Raises:
        CheckpointError: none is found, or the named one is incomplete or damaged.
    """
    if wanted.lower() not in ("latest", "true"):
        verify(Path(wanted))
        return Path(wanted)
    problems = []
    for folder in reversed(checkpoints(run_dir)):
        try:
            verify(folder)
        except CheckpointError as error:
            problems.append(str(error))
        else:
            return folder
    raise CheckpointError(
        f"{str(run_dir)!r} holds no good checkpoint to resume from. " + " ".join(problems)
    )


def prune(run_dir: Path, keep: int | None) -> None:
    """Delete the oldest checkpoints beyond `keep`; None or 0 keeps all."""
    if keep:
        for folder in checkpoints(run_dir)[:-keep]:
            shutil.rmtree(folder)


def reader(file: Path) -> Callable[[str], Tensor]:
    """A function from a tensor's name to the tensor, reading it from a safetensors file when asked.

    Args:
        file: the file; weights that stand in several shards instead are found by their index.

    Raises:
        CheckpointError: the file is missing or is no safetensors file.
    """
    if file.name == WEIGHTS and not file.exists() and has_weights(file.parent):
        return _sharded_reader(file.parent)
    try:
        source = safe_open(str(file), framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{str(file)!r} cannot be read: {error}") from error
    names = set(source.keys())

    def read(name: str) -> Tensor:
        if name not in names:
            raise KeyError(name)
        return source.get_tensor(name)

    return read


def _sharded_reader(folder: Path) -> Callable[[str], Tensor]:
    """`reader` over several files."""
    places = tensor_places(folder)
    read = {part: reader(part) for part in set(places.values())}
    return lambda name: read[places[name]](name)
