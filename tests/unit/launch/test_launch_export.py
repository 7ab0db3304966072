"""What an exported folder is, adapters merged or not."""

import json
import sys

import pytest
import torch

from launch import export
from mm_moe.errors import ConfigError
from mm_moe.models import MultimodalMoEModel
from tests.unit.models.test_folder import trained_model
from tests.unit.models.test_modeling import BOTH, IMAGE_ONLY, TEXT_ONLY, batch_of


def run_of(folder, **fields) -> MultimodalMoEModel:
    """A finished run's folder, as far as export looks at it."""
    model = trained_model(**fields)
    model.save_pretrained(folder / "run" / "final")
    (folder / "run" / "final" / "tokenizer.json").write_text("{}")
    return model


@torch.no_grad()
def test_a_merged_folder_loads_without_peft_and_computes_the_same(tmp_path, monkeypatch, capsys):
    model = run_of(tmp_path, lora={"r": 2}, prompt="replay")
    output = tmp_path / "merged"
    assert export.main([str(tmp_path / "run"), "--output", str(output), "--merge_lora"]) == 0
    monkeypatch.setitem(sys.modules, "peft", None)
    merged = MultimodalMoEModel.from_pretrained(output)
    assert merged.config.lora is None
    assert not [name for name in merged.state_dict() if "lora" in name or "base_layer" in name]
    assert sum(p.numel() for p in merged.parameters()) < sum(p.numel() for p in model.parameters())
    batch = batch_of([BOTH, IMAGE_ONLY, TEXT_ONLY])
    torch.testing.assert_close(merged(**batch).logits, model(**batch).logits, rtol=0, atol=1e-5)
    assert (output / "tokenizer.json").read_text() == "{}"
    capsys.readouterr()


def test_a_folder_with_adapters_is_copied_as_it_is(tmp_path, capsys):
    run_of(tmp_path, lora={"r": 2})
    assert export.main([str(tmp_path / "run"), "--output", str(tmp_path / "copy")]) == 0
    for name in ("model.safetensors", "config.json"):
        files = [tmp_path / place / name for place in ("run/final", "copy")]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["lora"]["r"] == 2
    capsys.readouterr()


def test_checkpoints_and_places_that_cannot_be(tmp_path):
    words = ["--output", str(tmp_path / "o"), "--checkpoint", "../x/checkpoint-2"]
    with pytest.raises(ConfigError, match="must be latest or a checkpoint-N"):
        export.main([str(tmp_path), *words])
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "model.safetensors").write_bytes(b"")
    inside = tmp_path / "final" / "model.safetensors" / "x"
    with pytest.raises(ConfigError, match="lies in a file"):
        export.main([str(tmp_path), "--output", str(inside)])


def test_what_cannot_be_merged_is_said(tmp_path):
    run_of(tmp_path)
    argv = [str(tmp_path / "run"), "--merge_lora"]
    with pytest.raises(ConfigError, match="has no LoRA adapters; leave --merge_lora out"):
        export.main([*argv, "--output", str(tmp_path / "new")])
    with pytest.raises(ConfigError, match="say where with --output DIR"):
        export.main([*argv, "--push_to_hub", "org/name"])
    assert not (tmp_path / "new").exists()
