"""Real training runs in the ranks of the harness: what the program does after its start."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

# Few samples per rank and most of them lacking something, so that ranks often have no row of a
# modality, unequal token counts and experts without tokens.
RECIPE = """\
# A run of seconds.
dataset: emoji
missing_type: both
missing_ratio: 0.9
backbone: small_clip
pretrained: none
backbone_config: {patch_size: 16, num_blocks: 2, width: 32, num_heads: 2, hidden: 64}
moe_layers_idx: [0, 1]
num_experts: 4
prompt: replay
max_steps: 20
global_batch_size: 4
shuffle_buffer: 100
learning_rate: 1.0e-3
max_grad_norm: 0.1
weight_decay: 0.05
logging_steps: 1
save_steps: 10
test_split: validation
per_device_eval_batch_size: 60
"""


def write_recipe(folder: Path, text: str = RECIPE) -> str:
    """The recipe as a file."""
    path = folder / "recipe.yaml"
    path.write_text(text)
    return str(path)


def train_here(rank: int, world_size: int, commands: list[list[str]]) -> list[dict[str, Any]]:
    """Run each command line in this rank, one after the other.

    Returns:
        One dict per run: "metrics" (the logged steps) and "scores".
    """
    import launch.run
    from launch.cli import RecipeParser, quiet
    from mm_moe.training import runtime

    quiet()
    runtime.stop = lambda: None  # the harness owns the process group
    results = []
    for argv in commands:
        parser = RecipeParser()
        launch.run.execute(parser, parser.namespace(argv), argv)
        folder = Path(argv[argv.index("--output_dir") + 1])
        runtime.barrier()
        results.append(read_run(folder))
        sys.stdout.flush()
    return results


def read_run(folder: Path) -> dict[str, Any]:
    """What a run wrote about itself."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    scores = folder / "scores.json"
    return {
        "metrics": [json.loads(line) for line in lines],
        "scores": json.loads(scores.read_text()) if scores.exists() else None,
    }


def column(result: dict[str, Any], key: str) -> list[float]:
    """One logged figure by step."""
    return [entry[key] for entry in result["metrics"] if key in entry]
