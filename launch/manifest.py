"""`run.json`: what a run is made of, and each of its starts.

Written aside and renamed, so that a kill leaves the old one or the new one. It names no host and
holds no secret.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from launch.cli import ROOT
from mm_moe.data.web import shown_url
from mm_moe.errors import CheckpointError

RUN_FILE = "run.json"
SECRET_FLAGS = ("hub_token",)
ADDRESS = re.compile(r"https?://[^\s\"'<>\\]+", re.IGNORECASE)  # also inside of a JSON object
PACKAGES = (
    "torch",
    "torchvision",
    "deepspeed",
    "transformers",
    "open-clip-torch",
    "datasets",
    "accelerate",
    "peft",
    "safetensors",
)


def package_versions() -> dict[str, str]:
    """Of Python and of what computes; a package that is absent is left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def source_state() -> dict[str, Any]:
    """The code: commit, whether files differ from it, and a hash of the difference.

    An installed wheel has none of these: the commit is "unknown".
    """
    commit = _git("rev-parse", "HEAD").strip()
    if not commit:
        return {"commit": "unknown", "dirty": None, "diff_sha256": None}
    changes = _git("diff", "HEAD")
    dirty = bool(_git("status", "--porcelain").strip())
    digest = hashlib.sha256(changes.encode()).hexdigest() if changes else None
    return {"commit": commit, "dirty": dirty, "diff_sha256": digest}


def _git(*words: str) -> str:
    """What git says of the source tree; nothing where there is no git or no repository."""
    try:
        found = subprocess.run(
            ["git", "-C", str(ROOT), *words],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout if found.returncode == 0 else ""


def hardware() -> dict[str, Any]:
    """The machine in words that identify no host."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "gpus": gpus,
        "system": platform.system(),
    }


def plain_flags(values: argparse.Namespace) -> dict[str, Any]:
    """Recipe and flags before anything is filled in, as JSON has them, without secrets."""
    found: dict[str, Any] = {}
    for key, value in sorted(vars(values).items()):
        found[key] = value.value if isinstance(value, Enum) else value
    return settings_without_secrets(json.loads(json.dumps(found, default=str)))


def settings_without_secrets(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Flags and values without those that hold a secret; of addresses, what `shown_url` shows."""
    return {key: _shown(value) for key, value in settings.items() if key not in SECRET_FLAGS}


def _shown(value: Any) -> Any:
    """A value with its addresses shortened, however deep they lie."""
    if isinstance(value, str):
        return without_url_secrets(value)
    if isinstance(value, Mapping):
        return {key: _shown(part) for key, part in value.items()}
    return [_shown(part) for part in value] if isinstance(value, list | tuple) else value


def without_flags(argv: list[str], flags: tuple[str, ...]) -> list[str]:
    """A command line without some flags and their values."""
    kept: list[str] = []
    dropping = False  # whether the word is the value of a dropped flag
    for word in argv:
        if word.startswith("--"):
            dropping = word[2:].split("=")[0].replace("-", "_") in flags
        if not dropping:
            kept.append(word)
    return kept


def without_secrets(argv: list[str]) -> list[str]:
    """A command line without the flags that hold a secret, and without what looks like a token."""
    kept = without_flags(argv, SECRET_FLAGS)
    shown = [word for word in kept if not word.split("=")[-1].startswith("hf_")]
    return list(map(without_url_secrets, shown))


def without_url_secrets(word: str) -> str:
    """A word of a command line; of addresses in it, only what `shown_url` shows."""
    return ADDRESS.sub(lambda found: shown_url(found[0]), word)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The content of `run.json`; None where there is no such file.

    Raises:
        CheckpointError: it is there and cannot be read.
    """
    file = folder / RUN_FILE
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{str(file)!r} cannot be read ({type(error).__name__}), so the settings of this run "
            "cannot be compared; move it away and give all flags of the run, with --config."
        ) from error
    if not isinstance(found, dict):
        raise CheckpointError(
            f"{str(file)!r} holds no JSON object; move it away and give all flags of the run, "
            "with --config."
        )
    return found


def run_id(folder: Path) -> str | None:
    """What the checkpoints of a run name as theirs; None where that is not known.

    Raises:
        CheckpointError: `run.json` is there and cannot be read.
    """
    found = (read_manifest(folder) or {}).get("id")
    return found if isinstance(found, str) else None


def write_manifest(folder: Path, record: dict[str, Any]) -> None:
    """Replace `run.json` as a whole."""
    aside = folder / f"{RUN_FILE}.tmp"
    with aside.open("w", encoding="utf-8") as stream:
        stream.write(json.dumps(record, indent=1, default=str))
        stream.flush()
        os.fsync(stream.fileno())
    aside.replace(folder / RUN_FILE)


def earlier_starts(folder: Path) -> list[dict[str, Any]]:
    """The starts that `run.json` lists; none where it cannot be read."""
    try:
        found = (read_manifest(folder) or {}).get("starts", [])
    except CheckpointError:
        return []
    return found if isinstance(found, list) else []


def new_start(*, step: int, world_size: int, ep_size: int, changed: list[str]) -> dict[str, Any]:
    """An entry of the list of starts."""
    return {
        "time": _now(),
        "from_step": step,
        "world_size": world_size,
        "ep_size": ep_size,
        **source_state(),
        "changed": changed,
    }


def note_end(folder: Path, how: str) -> None:
    """Write into the newest start how it ended; a start without it was killed, or still runs."""
    try:
        record = read_manifest(folder)
    except CheckpointError:
        return
    if record and record.get("starts"):
        record["starts"][-1]["ended"] = {"time": _now(), "how": how}
        write_manifest(folder, record)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
