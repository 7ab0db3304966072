"""Every backbone takes the tokens that a prompt generates for rows that lack a modality."""

import itertools

import pytest
import torch

from mm_moe.backbones.entrance import Generated
from mm_moe.models import MultimodalMoEConfig, build_model
from mm_moe.registry import BACKBONES
from tests.contract.test_backbones import TINY

torch.set_num_threads(1)
OPT = {
    "model_type": "opt",
    "hidden_size": 16,
    "ffn_dim": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 40,
    "max_position_embeddings": 30,
    "word_embed_proj_dim": 16,
    **{"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2},
}
T5 = {"model_type": "t5", "d_model": 16, "d_ff": 24, "d_kv": 6, "num_layers": 2, "num_heads": 2}
T5 |= {"vocab_size": 40, "feed_forward_proj": "gated-gelu"}
LM = TINY["blip2"] | {"text": "language_model"}
# No prompt acts there, or (clinical) a fill makes what is missing; the model says so.
WITHOUT_BLOCKS = ("clinical", "features", "small")
CASES = {(name, "") for name in BACKBONES if name not in WITHOUT_BLOCKS}
CASES |= {("blip2", "vision"), ("blip2", "opt"), ("blip2", "t5"), ("dual", "blip2 t5")}
SETTINGS = {
    "vision": TINY["blip2"] | {"blocks": "vision"},
    "opt": LM | {"text_config": OPT},
    "t5": LM | {"text_config": T5},
}
SETTINGS["blip2 t5"] = TINY["dual"] | {
    "image": {"backbone": "blip2", "config": TINY["blip2"]},
    "text": {"backbone": "blip2", "config": SETTINGS["t5"]},
}


def settings_of(case):
    name, variant = case
    return SETTINGS[variant] if variant else TINY[name]


def some_rows(tower, num_rows):
    """Rows of noise as long as the tower likes; a text ends where `stand_in` says it does."""
    blank = tower.blank()
    if "input_ids" in blank:
        ids = torch.randint(3, 39, (num_rows, 5))
        ends = tower.stand_in(num_rows, 5).get("input_ids")
        if ends is not None:
            ids[:, -1] = ends[:, -1]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "values" in blank:
        values = torch.randn(num_rows, 3, blank["values"].shape[2])
        return {"values": values, "mask": torch.ones(num_rows, 3, dtype=torch.bool)}
    pixels = blank["pixel_values"]
    return {"pixel_values": torch.randn(num_rows, *pixels.shape[1:])}


@pytest.mark.parametrize("case", sorted(CASES), ids=" ".join)
def test_generated_rows_are_read_like_rows_that_were_there(case):
    """Tokens that say what a row holds, given as generated ones, make that row's feature."""
    torch.manual_seed(0)
    backbone_class = BACKBONES.resolve(case[0])
    backbone = backbone_class(settings_of(case), modalities=backbone_class.supported).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.ndim > 1:  # libraries start some at 1e-10
                parameter.normal_(std=0.3)
        for name, tower in backbone.towers.items():
            own, other = some_rows(tower, 2), some_rows(tower, 3)
            tokens_GPD, _ = tower.enter(other).source
            generated = Generated(tower.enter(own), tokens_GPD)
            assert tokens_GPD.shape[2] == tower.source_width
            expected = torch.cat([backbone.encode(name, rows)[0] for rows in (own, other)])
            found, _ = backbone.encode(name, own, generated=generated)
            assert torch.allclose(found, expected, atol=1e-5), name
            assert not torch.allclose(expected[2], expected[3], atol=1e-3), name

            blank = Generated(tower.enter(tower.blank()), tokens_GPD)
            found, _ = backbone.encode(name, None, generated=blank)  # no row here has the modality
            assert torch.allclose(found[1:], expected[2:], atol=1e-5), name


def model_and_batch(case, modalities=None, **prompt_config):
    """A model with the generative prompt, and a batch in which every pattern occurs twice."""
    torch.manual_seed(0)
    modalities = modalities or BACKBONES.resolve(case[0]).supported
    config = MultimodalMoEConfig(
        backbone=case[0],
        backbone_config=settings_of(case),
        modalities=modalities,
        num_labels=3,
        prompt="generative",
        prompt_config={"length": 2, "width": 4, "steps": 3} | prompt_config,
    )
    model = build_model(config).eval()
    patterns = [p for p in itertools.product([True, False], repeat=len(modalities)) if any(p)]
    present_BM = torch.tensor(patterns + patterns)
    inputs = {
        name: some_rows(model.backbone.towers[name], int(present_BM[:, m].sum()))
        for m, name in enumerate(modalities)
    }
    return model, present_BM, inputs


WITH_OTHERS = sorted(case for case in CASES if len(BACKBONES.resolve(case[0]).supported) > 1)


TWO_IMAGES = ("image_0", "image_1", "text")


@pytest.mark.parametrize(
    ("case", "modalities"),
    [*((case, None) for case in WITH_OTHERS), (("blip2", "t5"), TWO_IMAGES)],
    ids=str,
)
def test_every_part_of_the_generative_prompt_learns(case, modalities):
    model, present_BM, inputs = model_and_batch(case, modalities)
    with torch.no_grad():
        for parameter in model.parameters():  # far from values at which parts hardly act
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    output = model(present_BM, inputs)
    for feature_BD in output.features.values():
        assert feature_BD.abs().sum(1).min() > 0  # also of the rows that lack it
    output.logits.square().sum().backward()
    dead = [n for n, p in model.prompt.named_parameters() if not p.grad.abs().max() > 0]
    assert dead == []


@pytest.mark.parametrize("case", WITH_OTHERS, ids=" ".join)
def test_generation_leaves_the_rows_that_have_the_modality_alone(case):
    model, present_BM, inputs = model_and_batch(case, signal=False, types=False)
    with torch.no_grad():
        features = model(present_BM, inputs).features
        for m, name in enumerate(model.modalities):
            plain, _ = model.backbone.encode(name, inputs[name])
            assert torch.allclose(features[name][present_BM[:, m]], plain, atol=1e-6)
