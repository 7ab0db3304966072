"""Several members on 2 processes: one identity in float64, and one curve through the program."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from launch import evaluate_run
from mm_moe.models import ComposedConfig, ComposedModel, MultimodalMoEConfig
from mm_moe.moe.parallel import is_expert_parameter, make_expert_parallel
from tests.distributed.harness import run_distributed
from tests.distributed.runs import column, train_here, write_recipe

pytestmark = pytest.mark.distributed
ARRAYS = {"image": {"shape": [8, 8]}, "audio": {"shape": [3]}}
PRESENT = [[1, 1], [1, 0], [1, 0], [0, 1], [0, 0], [1, 1]]
SPLITS = ([6, 0], [3, 3], [1, 5])  # samples of each process


def model_of() -> ComposedModel:
    """A convolution with batch normalisation, an MLP, and both, each with four experts."""
    torch.manual_seed(0)
    members = {}
    for name in ("image", "audio", "image+audio"):
        over = name.split("+")
        config = MultimodalMoEConfig(
            backbone="small",
            backbone_config={"arrays": {m: ARRAYS[m] for m in over}, "num_blocks": 1},
            modalities=over,
            moe={"num_experts": 4, "top_k": 2},
            moe_mode="dense",
            upcycle_noise=0.1,
            num_labels=3,
            fusion="low_rank",
            fusion_rank=2,
            fusion_size=5,
        )
        members[name] = config.to_dict()
    config = ComposedConfig(modalities=list(ARRAYS), members=members, num_labels=3)
    return ComposedModel(config).double().train()


def part(start: int, stop: int) -> dict:
    present = torch.tensor(PRESENT).bool()
    generator = torch.Generator().manual_seed(3)
    inputs = {}
    for m, (name, about) in enumerate(ARRAYS.items()):
        values = torch.randn(6, *about["shape"], generator=generator, dtype=torch.float64)
        values = values[start:stop][present[start:stop, m]]
        if len(values):
            inputs[name] = {"values": values}
    return {"present": present[start:stop], "inputs": inputs}


def step(model: ComposedModel, start: int, stop: int, share: float) -> torch.Tensor:
    output = model(**part(start, stop))
    loss = output.logits.square().sum() * share / 6
    (loss + sum(output.losses.values())).backward()
    return output.logits.detach()


def on_rank(rank: int, world_size: int) -> list[dict]:
    found = []
    for counts in SPLITS:
        model = model_of()
        make_expert_parallel(model, ep_size=2)
        start = sum(counts[:rank])
        logits = step(model, start, start + counts[rank], world_size)
        grads = {}
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            grads[name] = (parameter.grad, is_expert_parameter(parameter))
        found.append({"logits": logits, "grads": grads})
    return found


def test_two_processes_equal_one():
    model = model_of()
    expected = step(model, 0, 6, 1.0)
    ranks = run_distributed(on_rank, 2)
    for case in range(len(SPLITS)):
        both = [ranks[rank][case] for rank in range(2)]
        assert torch.allclose(torch.cat([r["logits"] for r in both]), expected, atol=1e-10)
        for name, parameter in model.named_parameters():
            pieces = [r["grads"][name][0] for r in both]
            if both[0]["grads"][name][1]:  # experts: each rank holds its own, summed over both
                mean = torch.cat(pieces) / 2
            else:
                mean = (pieces[0] + pieces[1]) / 2
            assert torch.allclose(mean, parameter.grad, atol=1e-9), name


RECIPE = """\
# A run of seconds.
dataset: emoji
missing_type: both
missing_ratio: 0.6
backbone: small_clip
pretrained: none
backbone_config: {patch_size: 16, num_blocks: 2, width: 32, num_heads: 2, hidden: 64}
moe_layers_idx: [1]
num_experts: 4
experts_over: [image, text, image+text]
max_steps: 5
global_batch_size: 4
shuffle_buffer: 50
learning_rate: 1.0e-3
logging_steps: 1
save_strategy: "no"
test_split: validation
per_device_eval_batch_size: 60
"""


@pytest.mark.slow
def test_the_program_trains_members_in_two_stages(tmp_path):
    words = ["--config", write_recipe(tmp_path, RECIPE)]
    first = tmp_path / "image"
    alone = [*words, "--experts_over", "image", "--max_steps", "1", "--output_dir", str(first)]
    curves, folders = [], [tmp_path / "one", tmp_path / "two"]
    for world_size, folder in enumerate(folders, start=1):
        second = [*words, "--init_members", f"image={first}", "--freeze_members", "image"]
        second += ["--output_dir", str(folder), "--ep_size", str(world_size)]
        commands = [alone, second] if world_size == 1 else [second]
        found = run_distributed(train_here, world_size, commands, timeout_s=900)[0][-1]
        curves.append(column(found, "loss"))
    assert len(curves[0]) == 5
    assert np.allclose(curves[0], curves[1], rtol=1e-4)
    start = ComposedModel.from_pretrained(first / "final").member("image").state_dict()
    end = ComposedModel.from_pretrained(folders[1] / "final").member("image").state_dict()
    assert all(torch.equal(start[name], value) for name, value in end.items())
    scores = json.loads((folders[1] / "scores.json").read_text())
    title = "product of image, text, image+text"
    assert evaluate_run.main([str(folders[1])]) == 0
    again = json.loads((folders[1] / "evaluation-validation.json").read_text())
    for condition, metrics in scores["models"][title].items():
        (found,) = again["models"].values()
        assert found[condition]["accuracy"] == pytest.approx(metrics["accuracy"], abs=1e-6)
