"""Checkpoints that do not hold what the model needs: refused with file, tensor and both numbers."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from launch import export
from mm_moe.checkpoint import logical, store
from mm_moe.errors import CheckpointError
from mm_moe.models import MultimodalMoEModel
from mm_moe.moe.layer import MoELayer
from mm_moe.moe.settings import MoESettings
from tests.unit.models.test_folder import trained_model

EXPERTS = 3
WEIGHT = "1.experts.w_in"


def rewrite(file, change) -> None:
    """Change the tensors of a safetensors file."""
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def lacks_an_expert(name):
    return lambda tensors: tensors.update({name: tensors[name][:-1].clone()})


def has_one_twice(name):
    return lambda tensors: tensors.update({name: torch.cat([tensors[name], tensors[name][-1:]])})


def lacks(name):
    return lambda tensors: tensors.pop(name)


def other_width(name):
    return lambda tensors: tensors.update({name: tensors[name][..., :-1].clone()})


def model_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    sparse = MoELayer(width=4, hidden=8, settings=MoESettings(num_experts=EXPERTS))
    return nn.Sequential(nn.Linear(4, 4), sparse)


def engine_of(seed: int):
    """What the optimizer's reader looks at of a ZeRO-0 engine, after one step."""
    model = model_of(seed)
    optimizer = torch.optim.AdamW(model.parameters())
    y, record = model[1](model[0](torch.randn(6, 4)))
    (y.sum() + record.losses["load_balance"]).backward()
    optimizer.step()
    return SimpleNamespace(module=model, optimizer=optimizer)


DAMAGES = [
    (lacks_an_expert, ["holds 2 experts, the model has 3"]),
    (has_one_twice, ["holds 4 experts, the model has 3"]),
    (lacks, ["has no tensor"]),
    (other_width, ["(3, 4, 7)", "(3, 4, 8)"]),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES)
def test_damaged_weights_are_named(damage, words, tmp_path):
    file = tmp_path / store.WEIGHTS
    save_file(logical.full_weights(model_of(1)), file)
    rewrite(file, damage(WEIGHT))
    with pytest.raises(CheckpointError) as caught:
        logical.load_weights(model_of(2), store.reader(file), file=file)
    said = str(caught.value)
    assert all(word in said for word in [*words, str(file), f"'{WEIGHT}'", "another checkpoint"])


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq", "master"])
@pytest.mark.parametrize(("damage", "words"), DAMAGES)
def test_damaged_optimizer_state_is_named(key, damage, words, tmp_path):
    file, name = tmp_path / store.OPTIMIZER, f"{key}/{WEIGHT}"
    tensors, step = logical.optimizer_tensors(engine_of(1))
    save_file(tensors, file)
    rewrite(file, damage(name))
    with pytest.raises(CheckpointError) as caught:
        logical.load_optimizer(engine_of(2), store.reader(file), step, file=file)
    said = str(caught.value)
    assert all(word in said for word in [*words, str(file), f"'{name}'", "another checkpoint"])


def test_an_intact_optimizer_comes_back(tmp_path):
    source, target = engine_of(1), engine_of(2)
    tensors, step = logical.optimizer_tensors(source)
    save_file(tensors, tmp_path / "x.safetensors")
    logical.load_optimizer(target, store.reader(tmp_path / "x.safetensors"), step)
    again, _ = logical.optimizer_tensors(target)
    assert step == 1
    assert all(torch.equal(value, again[name]) for name, value in tensors.items())


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A saved model's tensors, the name of a stack of experts among them, and its folder."""
    folder = tmp_path_factory.mktemp("published")
    trained_model().save_pretrained(folder)
    tensors = load_file(folder / store.WEIGHTS)
    return folder, next(name for name in tensors if name.endswith("experts.w_in"))


@pytest.mark.parametrize("damage", [lacks_an_expert, has_one_twice, lacks, other_width])
def test_a_damaged_model_folder_neither_loads_nor_leaves(damage, published, tmp_path):
    source, name = published
    run = tmp_path / "run"
    final = run / "final"
    final.mkdir(parents=True)
    for file in source.iterdir():
        (final / file.name).write_bytes(file.read_bytes())
    assert export.main([str(run), "--output", str(tmp_path / "good")]) == 0
    assert MultimodalMoEModel.from_pretrained(tmp_path / "good") is not None
    rewrite(final / store.WEIGHTS, damage(name))
    with pytest.raises(CheckpointError) as caught:
        MultimodalMoEModel.from_pretrained(final)
    assert str(final) in str(caught.value)
    assert name in str(caught.value)
    with pytest.raises(CheckpointError) as caught:
        export.main([str(run), "--output", str(tmp_path / "bad")])
    said = str(caught.value)
    assert str(final / store.WEIGHTS) in said
    assert name in said
    stack = load_file(source / store.WEIGHTS)[name]
    if damage in (lacks_an_expert, has_one_twice):
        held = len(stack) + (1 if damage is has_one_twice else -1)
        assert f"holds {held} experts, the model has {len(stack)}" in said
    assert not (tmp_path / "bad").exists()


def test_a_tensor_that_the_config_does_not_know(published, tmp_path):
    source, _ = published
    final = tmp_path / "run" / "final"
    final.mkdir(parents=True)
    for file in source.iterdir():
        (final / file.name).write_bytes(file.read_bytes())
    rewrite(final / store.WEIGHTS, lambda tensors: tensors.update(stray=torch.zeros(1)))
    with pytest.raises(CheckpointError, match=r"'stray' that its config\.json does not know"):
        export.main([str(tmp_path / "run"), "--output", str(tmp_path / "bad")])
