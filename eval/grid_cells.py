"""Runs the cells of a grid as the real programs, one process each, and keeps what is finished.

A cell's folder holds `run/` (the training, its model and predictions), `train.log`, `evaluate.log`
and, written last, `cell.json`. Whatever ends before that leaves a cell that is run again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from eval.grid_fork import ForkedProgram
from eval.grid_plan import Cell
from mm_moe.errors import ConfigError, MMMoEError

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")  # in one file or in several

PROGRAMS = Path(__file__).parents[1] / "launch"
CELL_FILE = "cell.json"
DONE, FAILED = "done", "failed"


@dataclass
class Runner:
    """How cells are run.

    Attributes:
        folder: of the grid.
        shared: flags of `launch/train.py` that all cells have.
        launcher: words before the training program, such as torchrun's.
        tests: test patterns.
        splits: splits that are scored, the test split last.
        test_seed: of the test masks.
        keep_models: whether the weights stay once they are scored.
        use_cpu: score on the CPU even where there is a GPU.
        say: what is told about each cell.
        fork: start programs from a process that has imported the libraries.
    """

    folder: Path
    shared: list[str]
    launcher: list[str]
    tests: list[str]
    splits: list[str]
    test_seed: int
    keep_models: bool
    use_cpu: bool
    say: Callable[[str], None]
    fork: bool = False
    _running: set[subprocess.Popen | ForkedProgram] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _stopped: bool = False

    def run(self, cells: Mapping[Cell, str], *, jobs: int) -> dict[Cell, dict[str, Any]]:
        """Run what is not finished; cells -> what is known of each afterwards.

        Args:
            cells: cell -> digest of its settings.
            jobs: cells at a time.
        """
        numbered = list(enumerate(cells.items(), start=1))

        def one(entry: tuple[int, tuple[Cell, str]]) -> dict[str, Any]:
            number, (cell, digest) = entry
            return self._one(cell, digest, f"[{number}/{len(numbered)}] {describe(cell)}")

        with ThreadPoolExecutor(jobs) as pool:
            try:
                return dict(zip(cells, pool.map(one, numbered), strict=True))
            except BaseException:  # Ctrl-C must not leave trainings behind
                self._stop()
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    def _one(self, cell: Cell, digest: str, title: str) -> dict[str, Any]:
        place = self.folder / "cells" / cell.folder_name
        known = read_cell(place)
        mine = known is not None and known["digest"] == digest
        if known and mine and known["status"] == DONE and self._covers(known):
            self.say(f"{title}: kept")
            return known
        trained = mine and any((place / "run" / "final" / name).is_file() for name in WEIGHTS)
        if not (known and trained and known["trained"]):
            if place.exists():
                shutil.rmtree(place)
            place.mkdir(parents=True)
        record: dict[str, Any] = {"digest": digest, "method": cell.method.name}
        record |= {"train": cell.train, "seed": cell.seed, "commit": git_commit()}
        record |= {"trained": bool(trained and known and known["trained"])}
        record |= {"status": FAILED, "error": "was stopped", "seconds": {}, "splits": {}}
        if known and record["trained"]:  # only further test patterns, or the scores, are lacking
            record |= {key: known[key] for key in ("seconds", "commit", "splits")}
        self._work(cell, place, record)
        write_json(place / CELL_FILE, record)
        took = " + ".join(f"{name} {seconds:.0f} s" for name, seconds in record["seconds"].items())
        said = f"FAILED: {record['error']}" if record["status"] == FAILED else took
        self.say(f"{title}: {said}")
        return record

    def _work(self, cell: Cell, place: Path, record: dict[str, Any]) -> None:
        """Train and score one cell; what comes of it goes into its record."""
        run = place / "run"
        train = [str(PROGRAMS / "train.py"), *cell.train_words(self.shared)]
        train += ["--output_dir", str(run)]
        record["command"] = [*(self.launcher or ["python"]), "launch/train.py", *train[1:]]
        if not record["trained"]:
            words = [*(self.launcher or [sys.executable]), *train]
            if not self._call("train", words, place, record):
                return
            record["trained"] = True
            write_json(place / CELL_FILE, record)
        score = [sys.executable, str(PROGRAMS / "evaluate_run.py"), str(run), "--predictions"]
        score += ["--resamples", "0", "--mask_seed", str(self.test_seed), "--split", *self.splits]
        before = [name for scored in record["splits"].values() for name in scored["conditions"]]
        score += ["--patterns", *dict.fromkeys([*before, *self.tests])]
        score += ["--use_cpu"] if self.use_cpu else []
        if not self._call("evaluate", score, place, record):
            return
        record["splits"] = {
            split: json.loads((run / f"evaluation-{split}.json").read_text())
            for split in self.splits
        }
        record |= {"status": DONE, "error": None}
        if not self.keep_models:
            shutil.rmtree(run / "final")

    def _call(self, name: str, words: list[str], place: Path, record: dict[str, Any]) -> bool:
        """Run one program with its output in a log; whether it ended well."""
        begin = time.monotonic()
        log = place / f"{name}.log"
        with log.open("w", encoding="utf-8") as file:
            with self._lock:
                if self._stopped:
                    return False
                process: subprocess.Popen | ForkedProgram
                if self.fork and words[0] == sys.executable:
                    process = ForkedProgram(words[1], words[2:], log=file)
                else:
                    process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT)
                self._running.add(process)
            status = process.wait()
            with self._lock:
                self._running.discard(process)
        record["seconds"][name] = round(time.monotonic() - begin, 2)
        if status:
            record["error"] = f"{name} ended with {status}: {last_words(log)} (see {log})"
        return status == 0

    def _stop(self) -> None:
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.terminate()

    def _covers(self, record: Mapping[str, Any]) -> bool:
        """Whether every test pattern is among the scores and the predictions."""
        return all(
            set(self.tests) <= set(record["splits"].get(split, {}).get("conditions", ()))
            for split in self.splits
        )


def describe(cell: Cell) -> str:
    """A cell in a line."""
    return f"{cell.method.name}, trained on {cell.train}, seed {cell.seed}"


def read_cell(place: Path) -> dict[str, Any] | None:
    """What an earlier call knew of a cell; None if that is nothing, or damaged."""
    try:
        record = json.loads((place / CELL_FILE).read_text())
        return record if {"digest", "status", "trained", "splits"} <= set(record) else None
    except (OSError, ValueError, TypeError):
        return None


def write_json(path: Path, value: Any) -> None:
    """Write aside, then rename."""
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(value, indent=1))
    aside.replace(path)


def last_words(log: Path) -> str:
    """The line of a log that says most about a failure."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["it said nothing"])[-1][:300]


def git_commit() -> str:
    """The commit of the source tree, or "unknown" for an installed wheel."""
    found = subprocess.run(
        ["git", "-C", str(PROGRAMS.parent), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or "unknown"


def check_runs(runs: Sequence[list[str]]) -> list[dict[str, Any]]:
    """Settings and data of trainings that would be started (see `launch/check_runs.py`).

    Raises:
        ConfigError: one of them would be refused; with its own words.
    """
    done = subprocess.run(
        [sys.executable, str(PROGRAMS / "check_runs.py")],
        input=json.dumps(runs),
        capture_output=True,
        text=True,
        check=False,
        env={k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
    )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ConfigError(said.removeprefix("error: "))
    return json.loads(done.stdout.strip().splitlines()[-1])["runs"]


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a grid's folder: two calls at once would run the same cells.

    Raises:
        ConfigError: another call holds it.
    """
    with (folder / "grid.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"another call works in {str(folder)!r}; wait for its end."
            ) from error
        yield


def run_program(main: Callable[[list[str]], int]) -> NoReturn:
    """Run the `main` of a grid's program; an expected failure is one line and status 2."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that trainings are ended, too
    try:
        status = main(sys.argv[1:])
    except MMMoEError as error:
        sys.stderr.write(f"error: {error}\n")
        status = 2
    except KeyboardInterrupt:
        status = 130
    sys.exit(status)
