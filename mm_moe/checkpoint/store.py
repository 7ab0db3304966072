"""Checkpoints on disk: written aside, summed, published by rename, checked before they are read.

A checkpoint folder is a Hugging Face model folder (config, safetensors, processor) with the state
to resume beside it: `optimizer.safetensors`, `scheduler.json`, `trainer_state.json`, `ranks.pt`,
and `manifest.json`, which lists every other file with its size and SHA-256. The file `latest` of a
run names its newest checkpoint; it is written last.

Whatever moment a process dies at, the run's folder holds a whole checkpoint: what is being written
is in `.saving-NAME`, what is being replaced in `.old-NAME`, what is being deleted in `.gone-NAME`.
`sweep` tidies up after it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mm_moe.errors import CheckpointError
from mm_moe.models.shards import WEIGHTS, has_weights, tensor_places

FORMAT = 2  # 1 had a file of random states for each rank, and none of the sums between two logs
MANIFEST = "manifest.json"
OPTIMIZER = "optimizer.safetensors"
SCHEDULER = "scheduler.json"
TRAINER_STATE = "trainer_state.json"
RANKS = "ranks.pt"
PROGRESS = "progress.json"
LATEST = "latest"
SAVING, OLD, GONE = ".saving-", ".old-", ".gone-"
RESUMED = (OPTIMIZER, SCHEDULER, TRAINER_STATE, RANKS, PROGRESS, "config.json")  # and weights
_NAME = re.compile(r"checkpoint-([0-9]{1,18})")
_READ = (".safetensors", ".bin", ".pt", ".json")  # what a loader may take from a folder
_LONGEST = 64 << 20  # bytes of a manifest; a sane one lists a few files
_BLOCK = 4 << 20  # bytes that are summed at once
_EARLIER = "resume from an earlier checkpoint-N."


def digest(file: Path) -> str:
    """The SHA-256 of a file, which is read once."""
    total, block = hashlib.sha256(), bytearray(_BLOCK)
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(block):
            total.update(memoryview(block)[:count])
    return total.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_synced(file: Path, text: str) -> None:
    """Replace a small file by one that is on the disk; a failure leaves the old one."""
    aside = file.with_name(f"{file.name}.tmp")
    try:
        with aside.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, file)
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    _sync_folder(file.parent)


def write_manifest(folder: Path, step: int, *, run_id: str | None = None) -> None:
    """List every file of `folder` with size and SHA-256, and bring all of it to the disk.

    Args:
        folder: about to be published.
        step: optimizer steps done.
        run_id: of the run that it belongs to, where runs are told apart.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            _sync_folder(path)
            continue
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
        name = path.relative_to(folder).as_posix()
        files[name] = {"bytes": path.stat().st_size, "sha256": digest(path)}
    record = {"format": FORMAT, "step": step, "run": run_id, "files": files}
    _write_synced(folder / MANIFEST, json.dumps(record, indent=1))


def publish(aside: Path, final: Path) -> None:
    """Rename a complete folder into place; an older folder of that name makes way at the same time.

    Dying between the two renames leaves the older folder aside; `sweep` puts it back.
    """
    old = final.with_name(f"{OLD}{final.name}")
    if os.path.lexists(final):
        discard(old)
        os.replace(final, old)
    os.replace(aside, final)
    _sync_folder(final.parent)
    discard(old)


def point_to(folder: Path) -> None:
    """Name a published checkpoint in `latest`: the last thing that a save does."""
    _write_synced(folder.parent / LATEST, f"{folder.name}\n")


def discard(aside: Path) -> None:
    """Remove a folder if that is possible; of a link the link, not what it leads to."""
    if aside.is_symlink() or aside.is_file():
        with contextlib.suppress(OSError):
            aside.unlink()
    else:
        shutil.rmtree(aside, ignore_errors=True)


def sweep(run_dir: Path) -> list[str]:
    """Tidy up after a process that died while it saved; call it while nobody saves here.

    Returns:
        The names of the folders that were removed or put back.
    """
    found = []
    for folder in sorted(run_dir.glob(f"{OLD}*")):
        final = folder.with_name(folder.name.removeprefix(OLD))
        found.append(folder.name)
        if os.path.lexists(final):
            discard(folder)
        else:
            os.replace(folder, final)
    for prefix in (SAVING, GONE):
        for folder in sorted(run_dir.glob(f"{prefix}*")):
            found.append(folder.name)
            discard(folder)
    return found


def verify(folder: Path, *, run_id: str | None = None, needed: Sequence[str] = ()) -> int:
    """Check a checkpoint against its manifest and return its step. Reads every byte once.

    Args:
        folder: of the checkpoint.
        run_id: the run that it must belong to; a checkpoint that names none belongs to any.
        needed: files that it must have.

    Raises:
        CheckpointError: the folder, its manifest or a file of it is missing, truncated, altered or
            unreadable; it holds a file to load that the manifest does not know; or it is of
            another run.
    """
    if not folder.is_dir():
        raise CheckpointError(
            f"checkpoint {str(folder)!r} does not exist; name a checkpoint-N folder of a run, or "
            "latest."
        )
    step, files = _read_manifest(folder, run_id)
    name = MANIFEST
    try:
        for name, (size, _) in files.items():  # sizes first: they cost nothing
            if not (folder / name).is_file():
                raise _incomplete(folder, f"{name} is missing")
            if (folder / name).stat().st_size != size:
                raise _damaged(folder, name)
        if missing := sorted(set(needed) - set(files)):
            raise _incomplete(folder, f"its {MANIFEST} lists no {missing[0]}")
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.suffix in _READ and name not in (MANIFEST, *files):
                raise _damaged(folder, name, f"is not in its {MANIFEST}")
        for name, (_, sha256) in files.items():
            if digest(folder / name) != sha256:
                raise _damaged(folder, name)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {str(folder)!r} is damaged: {name[:80]} cannot be read "
            f"({error.strerror}); {_EARLIER}"
        ) from error
    return step


def _read_manifest(folder: Path, run_id: str | None) -> tuple[int, dict[str, tuple[int, str]]]:
    """Step, and (bytes, SHA-256) by file name."""
    try:
        with (folder / MANIFEST).open(encoding="utf-8") as stream:
            manifest = json.loads(stream.read(_LONGEST))
        written, step, run = int(manifest["format"]), int(manifest["step"]), manifest.get("run")
        files = {
            _inside(name): (int(entry["bytes"]), str(entry["sha256"]))
            for name, entry in manifest["files"].items()
        }
    except (
        *(OSError, ValueError, KeyError, TypeError, AttributeError),
        *(OverflowError, RecursionError),  # of numbers and nesting that nobody wrote
    ) as error:
        raise _incomplete(folder, f"no readable {MANIFEST}") from error
    if written != FORMAT:
        raise CheckpointError(
            f"checkpoint {str(folder)!r} has format {written}, this release reads {FORMAT}; "
            "resume it with the release that wrote it, or start from its weights with --pretrained."
        )
    named = _NAME.fullmatch(folder.name)
    if named and int(named[1]) != step:
        raise CheckpointError(
            f"checkpoint {str(folder)!r} is damaged: its {MANIFEST} is of step {step}; {_EARLIER}"
        )
    if run_id and run and run != run_id:
        raise CheckpointError(
            f"checkpoint {str(folder)!r} belongs to another run than this folder's run.json; "
            f"{_EARLIER}"
        )
    return step, files


def _inside(name: str) -> str:
    """A name in a manifest, if it stays in the folder.

    Raises:
        ValueError: it does not.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError(name)
    return name


def _incomplete(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(f"checkpoint {str(folder)!r} is incomplete: {what}; {_EARLIER}")


def _damaged(folder: Path, name: str, what: str = "differs from its manifest") -> CheckpointError:
    return CheckpointError(f"checkpoint {str(folder)!r} is damaged: {name} {what}; {_EARLIER}")


def checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest step first."""
    found = [path for path in run_dir.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def _read_latest(run_dir: Path) -> tuple[Path | None, str]:
    """The folder that `latest` names, or None and what is wrong with it."""
    file = run_dir / LATEST
    try:
        with file.open(encoding="utf-8") as stream:
            name = stream.read(1000).strip()
    except (OSError, UnicodeDecodeError) as error:
        problem = "is missing" if isinstance(error, FileNotFoundError) else "cannot be read"
        return None, f"{str(file)!r} {problem}"
    if not name:
        return None, f"{str(file)!r} is empty"
    if not _NAME.fullmatch(name):
        return None, f"{str(file)!r} holds {name[:40]!r}, which is no checkpoint's name"
    return run_dir / name, ""


def last_saved(run_dir: Path) -> Path | None:
    """The checkpoint that a run saved last, as far as it stands; nothing is verified."""
    folder, _ = _read_latest(run_dir)
    if folder is not None and folder.is_dir():
        return folder
    return next(iter(checkpoints(run_dir)[::-1]), None)


def find(
    run_dir: Path,
    wanted: str,
    *,
    tell: Callable[[str], None] = lambda line: None,
    run_id: str | None = None,
    needed: Sequence[str] = (),
) -> Path:
    """The checkpoint that `--resume_from_checkpoint` means.

    Args:
        run_dir: the run's folder.
        wanted: a checkpoint folder, or "latest"/"true" for the newest good one of the run: the one
            that `latest` names, else the others from the highest step down.
        tell: is given a line for everything that was found damaged and passed over.
        run_id: see `verify`.
        needed: see `verify`.

    Raises:
        CheckpointError: none is found, or the named one is incomplete or damaged.
    """
    if wanted.lower() not in ("latest", "true"):
        verify(Path(wanted), run_id=run_id, needed=needed)
        return Path(wanted)
    order = checkpoints(run_dir)[::-1]
    named, problem = _read_latest(run_dir)
    if named is not None:
        order = [named, *(folder for folder in order if folder != named)]
    elif order:
        tell(f"{problem}; the folders of {str(run_dir)!r} are looked through.")
    problems = []
    for folder in order:
        try:
            verify(folder, run_id=run_id, needed=needed)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for line in problems:
            tell(line.replace(_EARLIER, f"{folder.name} is taken."))
        return folder
    why = " ".join(problems) or "It holds none; --resume_from_checkpoint auto starts anew then."
    raise CheckpointError(f"{str(run_dir)!r} holds no good checkpoint to resume from. {why}")


def prune(run_dir: Path, keep: int | None, *, newest: Path | None = None) -> None:
    """Delete the oldest checkpoints beyond `keep`, once the newest is known to be good.

    Args:
        run_dir: the run's folder.
        keep: how many stay; None or 0 keeps all.
        newest: the one just written, if not that of the highest step; later steps are those of a
            line that was left by resuming an earlier checkpoint, and stay until they are reached.

    Raises:
        CheckpointError: the newest is damaged; nothing is deleted.
    """
    found = checkpoints(run_dir)
    if newest is not None:
        found = found[: found.index(newest) + 1]
    old = found[:-keep] if keep else []
    if old:
        verify(found[-1])
    for folder in old:
        gone = folder.with_name(f"{GONE}{folder.name}")  # half a checkpoint is never in sight
        os.replace(folder, gone)
        discard(gone)


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
