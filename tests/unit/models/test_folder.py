"""A saved model is a Hugging Face folder that any process reads back, bit for bit."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

from mm_moe.errors import CheckpointError
from mm_moe.models import MultimodalMoEConfig, MultimodalMoEModel, build_model
from tests.unit.models.test_modeling import BOTH, IMAGE_ONLY, SMALL, SPARSE, TEXT_ONLY, batch_of

FRESH = """
import sys
sys.modules["deepspeed"] = None
import torch
from transformers import AutoModel
import mm_moe.models
torch.set_num_threads(1)
folder = sys.argv[1]
batch = torch.load(f"{folder}/batch.pt", weights_only=True)
model = AutoModel.from_pretrained(folder)
assert not model.training
with torch.no_grad():
    torch.save(model(**batch).logits, f"{folder}/again.pt")
assert not any(name.startswith("deepspeed") for name in sys.modules if sys.modules[name])
"""


def trained_model(**fields) -> MultimodalMoEModel:
    """Every parameter moved away from what a constructor would draw."""
    torch.manual_seed(0)
    fields = {"backbone_config": SMALL, "label_names": ["x", "y", "z"], "moe": SPARSE} | fields
    model = build_model(MultimodalMoEConfig(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def test_a_fresh_process_without_deepspeed_gives_equal_bits(tmp_path):
    model, batch = trained_model(prompt="replay"), batch_of([BOTH, IMAGE_ONLY, TEXT_ONLY])
    model.save_pretrained(tmp_path)
    torch.save(batch, tmp_path / "batch.pt")
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", FRESH, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "again.pt"), model(**batch).logits)


@pytest.mark.parametrize("prompt", ["none", "missing_aware", "replay"])
def test_every_tensor_survives(prompt, tmp_path):
    model = trained_model(prompt=prompt)
    model.save_pretrained(tmp_path)
    again = MultimodalMoEModel.from_pretrained(tmp_path)
    theirs = again.state_dict()
    assert theirs.keys() == model.state_dict().keys()
    assert all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())
    assert again.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict() | {
        "_name_or_path": "",
        "dtype": again.config.to_dict()["dtype"],
    }


def test_the_folder_says_what_it_is(tmp_path):
    trained_model().save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["model_type"] == "mm_moe"
    assert fields["architectures"] == ["MultimodalMoEModel"]
    assert fields["id2label"] == {"0": "x", "1": "y", "2": "z"}
    assert isinstance(AutoConfig.from_pretrained(tmp_path), MultimodalMoEConfig)
    assert isinstance(AutoModel.from_pretrained(tmp_path), MultimodalMoEModel)


def test_a_new_head_and_prompt_are_drawn_the_rest_is_kept(tmp_path):
    source = trained_model(label_names=None, num_labels=0)
    source.save_pretrained(tmp_path)
    model = MultimodalMoEModel.from_pretrained(tmp_path, prompt="replay", num_labels=4)
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.5)
    assert not model.head.bias.any()
    part = model.prompt.towers["image"]
    assert part.private_KnD.std().item() == pytest.approx(0.2, rel=0.5)
    assert not part.slot_gate_RD.any()
    assert all(p.isfinite().all() and p.abs().max() < 10 for p in model.prompt.parameters())
    ours = source.backbone.state_dict()
    assert all(torch.equal(v, ours[k]) for k, v in model.backbone.state_dict().items())


def test_a_lost_tensor_is_an_error(tmp_path):
    trained_model().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = load_file(path)
    name = next(k for k in state if k.endswith("experts.w_in"))
    state.pop(name)
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"lack 1 tensors.*{name}"):
        MultimodalMoEModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("prompt", ["none", "missing_aware", "replay", "correlated"])
def test_half_precision_round_trip(prompt, tmp_path):
    model = trained_model(prompt=prompt).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = MultimodalMoEModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    batch = batch_of([BOTH])
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
        assert again(**batch).logits.dtype == torch.bfloat16
