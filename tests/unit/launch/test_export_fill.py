"""What is published of a model whose fill borrows from training rows: the model, and no row."""

import json
import subprocess
import sys

import pytest
import torch

from launch import export
from launch.supports import FOLDER
from mm_moe.checkpoint.hub_stage import stage
from tests.fill_model import batch_of, model_of
from tests.unit.eval.test_eval_card import RECORD
from tests.unit.models.test_folder import FRESH

PATIENT = b"row of a patient"


@pytest.fixture
def run(tmp_path):
    """A finished run with its store of supports, as far as a publication looks at it."""
    folder = tmp_path / "run"
    model = model_of("retriever", {"segments": True, "around_default": True}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for name in ("final", "checkpoint-4"):
        model.save_pretrained(folder / name)
    store = folder / FOLDER
    store.mkdir()
    (store / "train-0123.arrow").write_bytes(PATIENT)
    arguments = {"moe_enable": False, "fusion": "transformer", "fill": "retriever"}
    arguments |= {"fill_config": '{"segments": true}'}
    record = RECORD | {"arguments": RECORD["arguments"] | arguments}
    (folder / "run.json").write_text(json.dumps(record))
    return folder, model


@pytest.mark.parametrize("shards", [False, True])
def test_no_support_is_published_and_the_card_names_the_fill(run, tmp_path, shards):
    folder, _ = run
    output = tmp_path / "out"
    more = ["--max_shard_size", "20KB"] if shards else []
    assert export.main([str(folder), "--output", str(output), *more]) == 0
    stage(folder / "checkpoint-4", tmp_path / "pushed", with_state=True)
    for place in (output, tmp_path / "pushed"):
        files = [path for path in place.rglob("*") if path.is_file()]
        assert not [path for path in files if "support" in path.name or path.suffix == ".arrow"]
        assert not [path for path in files if PATIENT in path.read_bytes()]
    card = (output / "README.md").read_text()
    assert "prompts `replay`, fusion `transformer`, fill `retriever`" in card
    assert "has to bring them (`supports`)" in card
    assert '| fill_config | {"segments": true} |' in card
    assert "experts per sparse layer" not in card


@pytest.mark.slow  # another process imports everything
def test_a_fresh_process_without_deepspeed_retrieves_with_equal_bits(run, tmp_path):
    folder, model = run
    output = tmp_path / "out"
    assert export.main([str(folder), "--output", str(output)]) == 0
    batch = dict(batch_of())
    torch.save(batch, output / "batch.pt")
    words = [sys.executable, "-W", "error::UserWarning", "-c", FRESH, str(output)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        logits = model(**batch).logits
    assert torch.equal(torch.load(output / "again.pt"), logits)
    other = {
        name: {**given, "rows": -torch.ones_like(given["rows"])}
        for name, given in batch["supports"].items()
    }
    with torch.no_grad():  # the supports say something
        assert not torch.equal(model(**batch | {"supports": other}).logits, logits)
