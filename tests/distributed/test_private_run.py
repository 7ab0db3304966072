"""Nothing of a patient is in what a run writes: logs, reports, checkpoints, cards, exports."""

from __future__ import annotations

import csv
import json
import os
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from launch import evaluate_run, export, prepare_data
from mm_moe.data.sets.prepared import PreparedData
from tests import hospital_layouts
from tests.distributed.harness import run_distributed
from tests.distributed.runs import train_here, write_recipe

pytestmark = pytest.mark.distributed
PATIENT, STAY = 91280000, 73340000
INSURER, RARE = "Zanzibar Mutual", 31415.9
RECIPE = """\
# A run of seconds.
dataset: mimic3
backbone: clinical
pretrained: none
backbone_config: {num_tokens: 2, token_width: 16}
missing_type: any
missing_ratio: 0.3
max_steps: 4
global_batch_size: 4
shuffle_buffer: 100
learning_rate: 1.0e-3
logging_steps: 1
save_steps: 2
"""


def train_and_listen(
    rank: int, world_size: int, commands: list[list[str]], heard: str
) -> list[dict[str, Any]]:
    """`train_here`, with all that the process says in a file."""
    sys.stdout.flush()
    kept = [os.dup(1), os.dup(2)]
    with open(heard, "w") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        try:
            return train_here(rank, world_size, commands)
        finally:
            sys.stdout.flush()
            for number, old in zip((1, 2), kept, strict=True):
                os.dup2(old, number)
                os.close(old)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, and the members of archives."""
    found = {}
    for path in filter(Path.is_file, folder.rglob("*")):
        found[str(path)] = path.read_bytes()
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                found |= {f"{path}/{name}": archive.read(name) for name in archive.namelist()}
    return found


def planted() -> dict[str, bytes]:
    """What must be nowhere."""
    words = {f"patient {n}": str(PATIENT + n).encode() for n in range(20)}
    words |= {f"stay {n}": str(STAY + n).encode() for n in range(hospital_layouts.STAYS)}
    words |= {"insurer": b"Zanzibar", "note": b"Fridolin", "value": str(RARE).encode()}
    return words | {"value as float32": np.float32(RARE).tobytes(), "date": b"2150-"}


def leaks(found: dict[str, bytes]) -> list[tuple[str, str]]:
    return [
        (name, what)
        for name, content in found.items()
        for what, word in planted().items()
        if word in content
    ]


@pytest.mark.slow  # a training run, a scoring, an export
def test_planted_identifiers_are_nowhere(tmp_path, capfd):
    raw, data, run = tmp_path / "raw", tmp_path / "data", tmp_path / "runs" / "one"
    hospital_layouts.mimic3(raw, patient=PATIENT, stay=STAY, insurer=INSURER, lab=RARE)
    options = '{"min_stays": 3, "min_age": 0, "seed": 1}'
    words = ["mimic3", "--source", str(raw), "--output", str(data), "--options", options]
    prepare_data.main(words)
    source = PreparedData(str(data))
    # The plants are there to be found, in the data and in training rows.
    assert {what for _, what in leaks(contents(data))} >= {"patient 0", "stay 0", "note"}
    with (data / "ids.csv").open() as file:
        split = {line["id"]: line["split"] for line in csv.DictReader(file)}
    assert split[f"stay-{STAY}"] == "train"
    assert source.modalities == ("static", "vitals", "labs", "text", "codes")

    recipe = write_recipe(tmp_path, RECIPE)
    argv = ["--config", recipe, "--data_dir", str(data), "--output_dir", str(run)]
    heard = tmp_path / "heard.txt"
    run_distributed(train_and_listen, 1, [argv], str(heard), timeout_s=300)
    assert evaluate_run.main([str(run), "--predictions", "--resamples", "0", "--use_cpu"]) == 0
    assert export.main([str(run), "--output", str(tmp_path / "runs" / "export")]) == 0
    found = contents(tmp_path / "runs")
    found |= {"said in training": heard.read_bytes()}
    said = capfd.readouterr()
    found |= {"said": (said.out + said.err).encode()}
    names = {Path(name).name for name in found}
    assert {"run.json", "report.html", "scores.json", "README.md", "metrics.jsonl"} <= names
    assert any("checkpoint-2" in name for name in found)
    assert leaks(found) == []
    # What a folder of prepared data says of itself names nobody either.
    for name in ("dataset_info.json", "quarantine.jsonl"):
        assert leaks({name: (data / name).read_bytes()}) == []
    assert json.loads((data / "dataset_info.json").read_text())["private"]


def test_the_search_finds_what_is_there(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", ids=np.array([f"stay-{STAY}"], "S20"))
    (tmp_path / "b.txt").write_text(f"x {PATIENT + 3} y")
    found = {what for _, what in leaks(contents(tmp_path))}
    assert found == {"stay 0", "patient 3"}
