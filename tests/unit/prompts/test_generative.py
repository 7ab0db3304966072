"""Generated tokens by hand: parts of a sequence, whose rows enter which tower, what is read."""

import pytest
import torch

from mm_moe.backbones.base import Tower
from mm_moe.backbones.clip import ClipTextTower
from mm_moe.errors import ConfigError
from mm_moe.models import MultimodalMoEConfig, build_model
from prompts.generative import GenerativePrompt, in_steps

torch.set_num_threads(1)
PAIR = {"widths": {"a": 4, "b": 6}, "num_blocks": {"a": 2, "b": 2}, "modalities": ("a", "b")}
CLIP = {"width": 16, "num_blocks": 2, "hidden": 24, "projection": 8, "vocab_size": 50}
ABOUT = {"width": 5, "length": 9}
SEQUENCES = {"width": 8, "num_heads": 2, "num_blocks": 2, "hidden": 16, "projection": 8}
SEQUENCES["sequences"] = {"text": ABOUT, "audio": ABOUT, "vision": ABOUT}


def test_parts_of_a_sequence_are_means_however_far_it_is_padded():
    x_NLD = torch.tensor([[[1.0], [3.0], [5.0], [7.0]], [[2.0], [9.0], [9.0], [9.0]]])
    mask_NL = torch.tensor([[True] * 4, [True, False, False, False]])
    assert in_steps(x_NLD, mask_NL, 2)[..., 0].tolist() == [[2, 6], [2, 0]]
    assert in_steps(x_NLD, None, 2)[..., 0].tolist() == [[2, 6], [5.5, 9]]
    three = in_steps(x_NLD, mask_NL, 3)  # tokens 0 1 | 2 | 3
    assert three[0, :, 0].tolist() == [2, 5, 7]


def test_rows_that_lack_a_modality_get_tokens_made_of_the_others():
    torch.manual_seed(0)
    prompt = GenerativePrompt(**PAIR, steps=2, length=1, width=3)
    present = torch.tensor([[True, True], [True, False], [False, True], [True, False]])
    mask = torch.ones(3, 4, dtype=torch.bool)
    sources = {"a": (torch.randn(3, 4, 4), mask), "b": (torch.randn(2, 5, 6), None)}
    generated = prompt.generate(present, sources)
    assert {name: x.shape for name, x in generated.items()} == {"a": (1, 2, 4), "b": (2, 5, 6)}
    # b takes five tokens: steps 0 0 0 1 1
    assert torch.equal(generated["b"][:, 0], generated["b"][:, 2])
    assert not torch.equal(generated["b"][:, 2], generated["b"][:, 3])
    other = {"a": (sources["a"][0].clone(), mask), "b": sources["b"]}
    other["a"][0][2] += 1  # of the last sample
    again = prompt.generate(present, other)
    assert torch.equal(again["b"][0], generated["b"][0])
    assert not torch.equal(again["b"][1], generated["b"][1])


def clip_batch(present):
    present_BM = torch.tensor(present)
    generator = torch.Generator().manual_seed(0)
    image, text = present_BM.sum(0).tolist()
    ids = torch.tensor([[0, 7, 9, 1]]).expand(text, -1)
    inputs = {
        "image": {"pixel_values": torch.randn(image, 3, 64, 64, generator=generator)},
        "text": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
    }
    there = {name for name, rows in (("image", image), ("text", text)) if rows}
    return {"present": present_BM, "inputs": {name: inputs[name] for name in there}}


@pytest.mark.parametrize("moe", [None, {"num_experts": 2, "top_k": 1}])
@pytest.mark.parametrize("rows", [[[True, True], [True, False], [False, True]], [[True, False]]])
def test_features_of_missing_modalities_are_generated(moe, rows):
    """Also where no row of the batch has the modality: the tower runs a blank row beside them."""
    torch.manual_seed(0)
    config = MultimodalMoEConfig(
        backbone_config=CLIP, prompt="generative", label_names=["x", "y"], moe=moe
    )
    model = build_model(config).eval()
    output = model(**clip_batch(rows))
    for feature_BD in output.features.values():
        assert feature_BD.abs().sum(1).min() > 0
    (output.logits.sum() + sum(output.losses.values())).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    alone = model(**clip_batch([[True, False]]))
    if len(rows) == 1:
        assert torch.equal(alone.logits, output.logits)


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_three_modalities_of_feature_sequences(missing):
    torch.manual_seed(0)
    config = MultimodalMoEConfig(
        backbone="sequences",
        backbone_config=SEQUENCES,
        modalities=["text", "audio", "vision"],
        prompt="generative",
        label_names=["x", "y"],
    )
    model = build_model(config).eval()
    present_BM = torch.ones(2, 3, dtype=torch.bool)
    present_BM[1, missing] = False
    inputs = {}
    for m, name in enumerate(config.modalities):
        num_rows = int(present_BM[:, m].sum())
        mask = torch.ones(num_rows, 7, dtype=torch.bool)
        inputs[name] = {"values": torch.randn(num_rows, 7, 5), "mask": mask}
    features = model(present_BM, inputs).features
    assert features[config.modalities[missing]][1].abs().sum() > 0


def test_a_tower_that_takes_no_generated_tokens_is_refused(monkeypatch):
    monkeypatch.setattr(ClipTextTower, "stand_in", Tower.stand_in)
    config = MultimodalMoEConfig(backbone_config=CLIP, prompt="generative", label_names=["x", "y"])
    with pytest.raises(ConfigError, match="takes no generated tokens; turn the prompt's gen"):
        build_model(config)
    config.prompt_config = {"generative": False}
    build_model(config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"generative": False, "types": False}, "cannot tell what is missing"),
        ({"steps": 0}, r"steps \(0\)"),
        ({"modalities": ("a",)}, "two modalities"),
    ],
)
def test_wrong_options_give_numbers(options, message):
    with pytest.raises(ConfigError, match=message):
        GenerativePrompt(**PAIR | options)
