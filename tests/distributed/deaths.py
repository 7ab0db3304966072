"""Runs that are killed at a chosen moment, in the ranks of the harness.

A moment is (place, occurrence): the process kills itself with SIGKILL the n-th time it gets there.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tests.distributed.harness import RankFailedError, run_distributed
from tests.distributed.runs import train_here

# A dropout, a router's noise and a bias without a loss, so that every kind of state matters; logs
# and checkpoints out of step with each other.
RECIPE = """\
# A run of seconds.
dataset: emoji
missing_type: both
missing_ratio: 0.5
backbone: small_clip
pretrained: none
backbone_config: {patch_size: 16, num_blocks: 2, width: 32, num_heads: 2, hidden: 64}
moe_layers_idx: [1]
num_experts: 2
router: jitter_topk
moe_config: {bias_update_rate: 0.001}
prompt: replay
prompt_config: {dropout: 0.2}
max_steps: 7
global_batch_size: 8
gradient_accumulation_steps: 2
shuffle_buffer: 50
learning_rate: 1.0e-3
max_grad_norm: 0.1
weight_decay: 0.05
logging_steps: 2
save_steps: 3
save_total_limit: 2
test_split: validation
per_device_eval_batch_size: 200
"""


def die_at(place: str, occurrence: int) -> None:
    """Make this process kill itself; only what is wrapped here differs from a real run."""
    from mm_moe.checkpoint import store
    from mm_moe.training import state
    from mm_moe.training.trainer import MultimodalTrainer

    left = [occurrence]

    def now() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(owner: Any, name: str, also: Callable[..., None] = lambda *args: None) -> None:
        inner = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if left[0] == 1:
                also(*args)
            now()
            return inner(*args, **kwargs)

        setattr(owner, name, wrapped)

    def cut(share: float) -> Callable[..., None]:
        def half_written(folder: Path, step: int) -> None:
            for file in sorted(folder.rglob("*")):
                if file.is_file():
                    os.truncate(file, int(share * file.stat().st_size))

        return half_written

    if place == "pass":  # the n-th forward pass; two to a step
        before(MultimodalTrainer, "compute_loss")
    elif place.startswith("written"):  # the n-th save, after that percentage of its bytes
        before(store, "write_manifest", cut(int(place.removeprefix("written")) / 100))
    elif place == "before rename":
        before(store, "publish")
    elif place == "before latest":
        before(store, "point_to")
    elif place == "in prune":
        before(store, "prune")
    elif place == "final weights":
        before(state, "save_weights")
    elif place == "scoring":
        import launch.scoring

        before(launch.scoring.Scorer, "score")
    else:
        raise AssertionError(place)


def train_or_die(
    rank: int, world_size: int, argv: list[str], place: str, occurrence: int
) -> dict[str, Any]:
    """One command line in this rank; rank 0 dies on the way, if it gets there."""
    if place and rank == 0:
        die_at(place, occurrence)
    return train_here(rank, world_size, [argv])[0]


def command(folder: Path, *more: str, recipe: str = RECIPE) -> list[str]:
    """A command line that goes on wherever the run in `folder` is."""
    file = folder.with_name("recipe.yaml")
    file.write_text(recipe)
    words = ["--config", str(file), "--deepspeed", "ds_configs/zero2.json"]
    return [*words, "--output_dir", str(folder), "--resume_from_checkpoint", "auto", *more]


def run_through(
    argv: list[str], world_size: int, deaths: Sequence[tuple[str, int]] = (), timeout_s: float = 240
) -> int:
    """Start a run again and again until nothing kills it; how often it was killed."""
    killed = 0
    for place, occurrence in deaths:
        try:
            run_distributed(train_or_die, world_size, argv, place, occurrence, timeout_s=timeout_s)
        except RankFailedError as error:
            if "status -9" not in str(error):
                raise
            killed += 1
    run_distributed(train_or_die, world_size, argv, "", 0, timeout_s=timeout_s)
    return killed


def remains(folder: Path) -> dict[str, Any]:
    """What two equal runs have in common: all but speed and the names of folders."""
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    state = json.loads((last / "trainer_state.json").read_text())
    scores = folder / "scores.json"
    found = {
        "final": (folder / "final" / "model.safetensors").read_bytes(),
        "weights": (last / "model.safetensors").read_bytes(),
        "optimizer": (last / "optimizer.safetensors").read_bytes(),
        "ranks": (last / "ranks.pt").read_bytes(),
        "scheduler": (last / "scheduler.json").read_text(),
        "progress": (last / "progress.json").read_text(),
        "metrics": [without_speed(line) for line in lines],
        "history": [without_speed(line) for line in state["log_history"]],
        "scores": json.loads(scores.read_text()) if scores.exists() else None,
    }
    for compared in sorted(folder.glob("compare-*")):
        lines = (compared / "metrics.jsonl").read_text().splitlines()
        found[compared.name] = [without_speed(json.loads(line)) for line in lines]
    return found


def without_speed(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if not key.startswith("perf/")}


def differing(left: Path, right: Path) -> list[str]:
    """What differs between two runs, down to the tensor."""
    ours, theirs = remains(left), remains(right)
    wrong = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    if "final" in wrong:
        a, b = (load_file(run / "final" / "model.safetensors") for run in (left, right))
        wrong += [name for name in a if not a[name].equal(b[name])]
    return wrong


def leftovers(folder: Path) -> list[str]:
    """Hidden folders that a save left."""
    return sorted(path.name for path in folder.glob(".*"))
