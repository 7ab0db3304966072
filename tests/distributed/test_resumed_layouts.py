"""A run that goes on over 2, 1 and 4 processes has every sample once in every epoch.

It also goes on below a name with spaces and letters of other alphabets, from a working folder where
nothing can be written, in the C locale and an odd time zone.
"""

from __future__ import annotations

import json
import os
import shlex
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.distributed.harness import run_distributed
from tests.distributed.runs import train_here

pytestmark = pytest.mark.distributed

SAMPLES, BATCH = 24, 4  # six steps are an epoch
RECIPE = """\
dataset: columns
dataset_options: {image_column: image, text_column: text, label_column: label, id_column: key}
backbone: small_clip
pretrained: none
backbone_config: {patch_size: 32, num_blocks: 1, width: 16, num_heads: 2, hidden: 16}
moe_layers_idx: [0]
num_experts: 4
prompt: none
missing_type: both
missing_ratio: 0.5
global_batch_size: 4
shuffle_buffer: 10
learning_rate: 1.0e-3
lr_scheduler_type: constant
logging_steps: 1
save_steps: 1
save_total_limit: 1
final_evaluation: false
"""


def write_run(folder: Path, *, output: Path) -> list[str]:
    """A table of pictures with names, and the flags of a run on it."""
    rows = []
    for index in range(SAMPLES):
        Image.new("RGB", (8, 8), (index, 90, 9)).save(folder / f"{index}.png")
        row = {"key": f"sample-{index}", "image": f"{index}.png", "text": "word"}
        rows.append(json.dumps(row | {"label": "ab"[index % 2]}))
    (folder / "train.jsonl").write_text("\n".join(rows))
    (folder / "recipe.yaml").write_text(RECIPE)
    words = ["--config", str(folder / "recipe.yaml"), "--data_dir", str(folder)]
    return [*words, "--output_dir", str(output), "--resume_from_checkpoint", "auto"]


def train_and_note(rank: int, world_size: int, argv: list[str]) -> dict[int, list[str]]:
    """The ids of this rank by step."""
    from mm_moe.training.trainer import MultimodalTrainer

    seen: dict[int, list[str]] = {}
    inner = MultimodalTrainer.compute_loss

    def noting(self, model, inputs, *args, **kwargs):
        seen.setdefault(self.state.global_step + 1, []).extend(inputs.ids)
        return inner(self, model, inputs, *args, **kwargs)

    MultimodalTrainer.compute_loss = noting
    train_here(rank, world_size, [argv])
    return seen


@pytest.mark.slow
def test_every_sample_once_over_changing_numbers_of_processes(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    argv, steps = write_run(data, output=tmp_path / "run"), {}
    for world_size, end in ((2, 4), (1, 7), (4, 12)):
        more = ["--max_steps", str(end), "--allow_drift", "true"]
        for found in run_distributed(train_and_note, world_size, [*argv, *more], timeout_s=400):
            for step, ids in found.items():
                steps.setdefault(step, []).extend(ids)
    assert sorted(steps) == list(range(1, 13))
    assert {len(ids) for ids in steps.values()} == {BATCH}
    everything = {f"sample-{index}" for index in range(SAMPLES)}
    for epoch in (range(1, 7), range(7, 13)):
        assert {key for step in epoch for key in steps[step]} == everything
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 13))


def train_elsewhere(rank: int, world_size: int, argv: list[str], environment: dict[str, str]):
    """Two starts of one run in a place that was not made for it."""
    import locale

    os.environ.update(environment)
    locale.setlocale(locale.LC_ALL, "")
    time.tzset()
    os.chdir("/proc")  # where even root writes nothing
    return train_here(rank, world_size, [[*argv, "--max_steps", str(n)] for n in (1, 2)])


def test_names_places_and_zones(tmp_path):
    folder, data = tmp_path / "läuft gut, 走り 'x'", tmp_path / "dätä set"
    data.mkdir()
    argv = write_run(data, output=folder)
    environment = {"LC_ALL": "C", "LANG": "C", "TZ": "Pacific/Kiritimati"}
    found = run_distributed(train_elsewhere, 1, argv, environment, timeout_s=400)[0]
    assert [line["step"] for line in found[1]["metrics"]] == [1, 2]
    assert [path.name for path in folder.glob("*point-*")] == ["checkpoint-2"]
    record = json.loads((folder / "run.json").read_text())
    assert [start["from_step"] for start in record["starts"]] == [0, 1]
    words = shlex.split(record["commands"]["resume"])
    assert words[words.index("--output_dir") + 1] == str(folder)
