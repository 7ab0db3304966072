"""A run over two processes, exported by the command line, loads anywhere with the same bits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.distributed.harness import run_distributed
from tests.distributed.runs import write_recipe
from tests.unit.models.test_folder import FRESH

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]


def probe(rows: int) -> dict:
    """A batch of complete, picture-only and text-only samples, or of none."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(3, 3, 64, 64, generator=generator)
    ids = torch.randint(3, 50, (3, 6), generator=generator)
    ids[:, 0], ids[:, 5] = 0, 1
    present = torch.tensor([[True, True], [True, False], [False, True]])[:rows]
    inputs = {}
    if rows:
        text = ids[present[:, 1]]
        inputs["image"] = {"pixel_values": pixels[present[:, 0]]}
        inputs["text"] = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    return {"present": present, "inputs": inputs}


def train(rank, world_size, argv):
    """The trained model's logits of the probe, still spread over the ranks; rank 0 has its rows."""
    import launch.run
    from launch.cli import RecipeParser, quiet
    from mm_moe.training import runtime

    quiet()
    found = []

    def look(run, *rest):
        run.model.eval()
        with torch.no_grad():
            found.append(run.model(**probe(0 if rank else 3)).logits)
        sizes = {len(entry) for name, entry in run.model.named_parameters() if "w_in" in name}
        found.append(sizes)

    launch.run.finish_run = look  # this process ends with the test
    runtime.stop = lambda: None
    parser = RecipeParser()
    launch.run.execute(parser, parser.namespace(argv), argv)
    return found


def test_an_exported_run_loads_without_deepspeed_and_gives_the_same_bits(tmp_path):
    argv = ["--config", write_recipe(tmp_path), "--output_dir", str(tmp_path / "run")]
    argv += ["--deepspeed", "ds_configs/zero2.json", "--ep_size", "2", "--max_steps", "4"]
    argv += ["--save_strategy", "no"]
    ranks = run_distributed(train, 2, argv, timeout_s=200)
    assert [sizes for _, sizes in ranks] == [{2}, {2}]  # of four experts
    program = [sys.executable, str(ROOT / "launch" / "export.py"), str(tmp_path / "run")]
    output = tmp_path / "published"
    for command in (
        [*program, "--output", str(output)],
        [sys.executable, "-c", FRESH, str(output)],
    ):
        if "-c" in command:
            torch.save(probe(3), output / "batch.pt")
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
        assert done.returncode == 0, done.stderr
    assert torch.equal(torch.load(output / "again.pt"), ranks[0][0])
    assert len(list(output.glob("*.safetensors"))) == 1
