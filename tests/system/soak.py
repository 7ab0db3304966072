"""A long run under kills, preemptions, stream faults and a damaged checkpoint, against a quiet one.

    python -m tests.system.soak                                # 2,000 steps, 60 blows
    python -m tests.system.soak --steps 120 --kills 4 --preemptions 2 --damages 1

Two processes train a small sparse CLIP with experts spread over both, from pictures of emojis that
stream over HTTP. The troubled run's server fails one request in twenty; at random steps one rank
or everything is killed (SIGKILL), or one rank gets SIGTERM; once the newest checkpoint loses a bit.
After each blow the same command line is started again. At the end weights, moments and every logged
loss must be the quiet run's, bit by bit. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mm_moe.batch import IMAGE, TEXT
from mm_moe.checkpoint import store
from mm_moe.data.sets.emoji import EmojiData
from mm_moe.errors import EXIT_PREEMPTED
from tests.flaky_server import FlakyServer, serving

ROOT = Path(__file__).parents[2]
SHARDS, ROWS = 4, 60
RECIPE = """\
# A small sparse run for the soak.
dataset: columns
dataset_options: {image_column: image, text_column: text, label_column: label, id_column: key,
  train: "train-{0..3}.parquet"}
missing_type: both
missing_ratio: 0.5
backbone: small_clip
pretrained: none
backbone_config: {patch_size: 16, num_blocks: 2, width: 32, num_heads: 2, hidden: 64}
moe_layers_idx: [0, 1]
num_experts: 4
ep_size: 2
prompt: replay
global_batch_size: 8
gradient_accumulation_steps: 2
shuffle_buffer: 100
learning_rate: 1.0e-3
logging_steps: 1
save_total_limit: 3
dataloader_num_workers: 1
stream_retries: 30
stream_timeout_s: 1
final_evaluation: false
"""


def write_data(folder: Path) -> None:
    """Emojis as Parquet shards."""
    source, stream = EmojiData(), EmojiData().stream("train").take(SHARDS * ROWS)
    rows = []
    for raw in stream:
        sample = source.to_sample(raw)
        label = source.label_names[sample.label]
        picture = {"bytes": sample.payload[IMAGE], "path": None}
        text = sample.payload[TEXT]
        rows.append({"key": sample.id, "image": picture, "text": text, "label": label})
    for shard in range(SHARDS):
        part = pa.Table.from_pylist(rows[shard * ROWS : (shard + 1) * ROWS])
        pq.write_table(part, folder / f"train-{shard}.parquet", row_group_size=20)
    (folder / "recipe.yaml").write_text(RECIPE)


class Driver:
    """Starts one run again and again, and ends it at chosen steps.

    Args:
        options: of the program.
        data: folder of recipe and data.
        server: where the data come from.
        folder: of the run.
    """

    def __init__(
        self, options: argparse.Namespace, data: Path, server: FlakyServer, folder: Path
    ) -> None:
        self.options, self.folder = options, folder
        self.log = folder.with_suffix(".log")
        self.words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        self.words += ["--nproc_per_node", "2", str(ROOT / "launch" / "train.py")]
        self.words += ["--config", str(data / "recipe.yaml"), "--data_dir", server.url]
        self.words += ["--deepspeed", str(ROOT / "ds_configs" / "zero2.json")]
        self.words += ["--max_steps", str(options.steps), "--save_steps", str(options.save_steps)]
        self.words += ["--output_dir", str(folder), "--resume_from_checkpoint", "auto"]
        self.starts = 0
        self.started_at = 0.0
        self.codes: Counter[int] = Counter()
        self.lost: list[int] = []  # steps that each blow cost

    def start(self) -> subprocess.Popen:
        """Start the command line in a process group of its own."""
        self.starts += 1
        self.started_at = time.time()
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        environment["PYTHONPATH"] = str(ROOT)
        return subprocess.Popen(
            self.words,
            stdout=self.log.open("a"),
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )

    def step(self) -> int:
        """The newest logged step."""
        file = self.folder / "metrics.jsonl"
        try:
            return int(json.loads(file.read_text().splitlines()[-1])["step"])
        except (OSError, ValueError, KeyError, IndexError):
            return 0

    def saved(self) -> int:
        """The step of the newest checkpoint."""
        found = store.checkpoints(self.folder)
        return int(found[-1].name.split("-")[1]) if found else 0

    def finished(self) -> bool:
        """Whether the run came to its end."""
        return (self.folder / "final" / store.WEIGHTS).is_file()

    def wait_for(self, process: subprocess.Popen, target: int) -> bool:
        """Wait until this start has logged a step; False if it ended before."""
        while process.poll() is None:
            file = self.folder / "metrics.jsonl"
            mine = file.exists() and file.stat().st_mtime > self.started_at
            if mine and self.step() >= target:
                return True
            time.sleep(0.05)
        return False

    def end(self, process: subprocess.Popen, *, timeout_s: float = 300) -> int:
        """Wait for the end, and count its status."""
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise SystemExit(f"the run did not end in {timeout_s:.0f} s; see {self.log}") from None
        self.codes[code] += 1
        return code

    def wait_for_none(self) -> None:
        """Wait until no process of the run is left; those of a launcher that died are orphans."""
        own = str(self.folder).encode()
        while True:
            left = []
            for entry in Path("/proc").iterdir():
                with contextlib.suppress(OSError):
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                    if own in words and entry.name.isdigit():
                        left.append(int(entry.name))
            if not left:
                return
            for number in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            time.sleep(0.2)

    def undisturbed(self) -> None:
        """Run to the end."""
        code = self.end(self.start(), timeout_s=24 * 3600)
        if code or not self.finished():
            raise SystemExit(f"the run ended with {code}:\n{self.log.read_text()[-3000:]}")


def ranks_of(process: subprocess.Popen) -> list[int]:
    """The process ids of the ranks: those children of the launcher that were given a rank."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            words = (entry / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError, IndexError):
            continue
        if entry.name.isdigit() and parent == process.pid:
            rank = next((w.split(b"=")[1] for w in words if w.startswith(b"RANK=")), None)
            if rank is not None:
                found[int(rank)] = int(entry.name)
    return [found[rank] for rank in sorted(found)]


def strike(driver: Driver, process: subprocess.Popen, blow: str, chance: random.Random) -> None:
    """One blow, and the end that it brings."""
    before = driver.step()
    ranks = ranks_of(process)
    if blow == "kill all" or not ranks:  # no rank is there yet, or no longer
        for number in (process.pid, *ranks):  # the ranks are in sessions of their own
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        driver.wait_for_none()
    else:
        number = signal.SIGTERM if blow == "preempt" else signal.SIGKILL
        with contextlib.suppress(ProcessLookupError):
            os.kill(chance.choice(ranks), number)
    driver.end(process)
    driver.lost.append(max(0, before - driver.saved()))


def damage(driver: Driver, chance: random.Random) -> str:
    """Flip a bit of the newest checkpoint."""
    folder = store.checkpoints(driver.folder)[-1]
    file = folder / chance.choice([store.WEIGHTS, store.OPTIMIZER])
    content = bytearray(file.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.write_bytes(content)
    return f"{folder.name}/{file.name}"


def troubled(driver: Driver, options: argparse.Namespace) -> dict[str, Any]:
    """The whole troubled run."""
    chance = random.Random(options.seed)
    blows = ["preempt"] * options.preemptions
    blows += [chance.choice(["kill one", "kill all"]) for _ in range(options.kills)]
    chance.shuffle(blows)
    targets = sorted(chance.sample(range(1, options.steps), len(blows)))
    damages = set(chance.sample(range(len(blows) // 3, len(blows)), options.damages))
    done: Counter[str] = Counter()
    harmed = []
    process = driver.start()
    for number, (blow, target) in enumerate(zip(blows, targets, strict=True)):
        early = chance.random() < options.early
        if early:
            time.sleep(chance.uniform(0, options.early_s))  # while it starts
        elif not driver.wait_for(process, target):
            break
        if options.jitter_s:
            time.sleep(chance.uniform(0, options.jitter_s))  # anywhere in a step or a save
        strike(driver, process, blow, chance)
        done[blow] += 1
        if number in damages and len(store.checkpoints(driver.folder)) > 1:
            harmed.append(damage(driver, chance))
        when = "at its start" if early else f"at step {target}"
        print(f"{blow} {when}: status {process.returncode}", flush=True)
        process = driver.start()
    for _ in range(20):  # a start may end by what a blow left behind only if something is wrong
        code = driver.end(process, timeout_s=24 * 3600)
        if code == 0:
            break
        process = driver.start()
    return {"blows": dict(done), "damaged": harmed}


def losses(folder: Path) -> dict[int, tuple]:
    """Step -> what must not differ between the two runs."""
    found: dict[int, tuple] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if "loss" not in entry:
            continue
        if entry["step"] in found:
            raise SystemExit(f"step {entry['step']} stands twice in metrics.jsonl")
        kept = {k: v for k, v in entry.items() if not k.startswith(("perf/", "data/"))}
        found[entry["step"]] = tuple(sorted(kept.items()))
    return found


def digest(file: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def compare(quiet: Path, other: Path, steps: int) -> dict[str, bool]:
    """What is equal, bit by bit."""
    last = f"checkpoint-{steps}"
    ours, theirs = losses(quiet), losses(other)
    return {
        "weights": digest(quiet / "final" / store.WEIGHTS)
        == digest(other / "final" / store.WEIGHTS),
        "moments": digest(quiet / last / store.OPTIMIZER) == digest(other / last / store.OPTIMIZER),
        "losses": ours == theirs,
        "every_step_once": list(theirs) == list(range(1, steps + 1)),
    }


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--save_steps", type=int, default=20)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--preemptions", type=int, default=10)
    parser.add_argument("--damages", type=int, default=1)
    parser.add_argument("--share", type=float, default=0.05, help="of the requests that fail")
    parser.add_argument("--jitter_s", type=float, default=0.2)
    parser.add_argument("--early", type=float, default=0.1, help="share of blows while it starts")
    parser.add_argument("--early_s", type=float, default=15.0, help="latest such blow")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="of both runs; a quiet one there is kept")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Run quietly, run troubled, compare."""
    options = arguments(argv)
    output = options.output or Path(tempfile.mkdtemp(prefix="soak-"))
    data, port = output / "data", output / "port.txt"
    if not data.exists():
        data.mkdir(parents=True)
        write_data(data)
    begin = time.monotonic()
    # One address for both, as the masks belong to the data set's name.
    with serving(data, port=int(port.read_text()) if port.exists() else 0) as server:
        port.write_text(str(server.server_address[1]))
        quiet = Driver(options, data, server, output / "quiet")
        if not quiet.finished():
            quiet.undisturbed()
        middle = time.monotonic()
        server.share = options.share
        other = Driver(options, data, server, output / "troubled")
        record = troubled(other, options)
        failed = dict(server.failed)
    end = time.monotonic()
    result = {
        "program": "soak",
        "steps": options.steps,
        **record,
        "starts": other.starts,
        "statuses": {str(code): count for code, count in sorted(other.codes.items())},
        "preempted_status": EXIT_PREEMPTED,
        "lost_steps_max": max(other.lost, default=0),
        "lost_steps_sum": sum(other.lost),
        "failed_requests": failed,
        "seconds_quiet": round(middle - begin),
        "seconds_troubled": round(end - middle),
        "equal": compare(quiet.folder, other.folder, options.steps),
    }
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    sys.exit(0 if all(main()["equal"].values()) else 1)
