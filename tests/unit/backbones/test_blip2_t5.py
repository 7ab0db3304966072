"""T5's encoder as a text tower: the library's own numbers, also with tokens in front."""

import pytest
import torch
from transformers import Blip2ForConditionalGeneration

from mm_moe.backbones.attention import attend
from mm_moe.backbones.blip2 import Blip2Backbone
from mm_moe.models import MultimodalMoEConfig, build_model
from mm_moe.registry import PROMPTS
from tests.unit.backbones.test_blip2 import FIELDS, INPUTS, T5, library_model

torch.set_num_threads(1)
SETTINGS = FIELDS | {"text": "language_model", "text_config": T5}
IDS_NL = torch.randint(3, 40, (2, 11), generator=torch.manual_seed(0))
MASK_NL = torch.arange(11) < torch.tensor([[11], [4]])
TEXT = {"input_ids": IDS_NL * MASK_NL, "attention_mask": MASK_NL.long()}


def t5_library(**changes):
    library = library_model(Blip2ForConditionalGeneration, text_config=T5 | changes)
    with torch.no_grad():  # its own draw makes the distances count for little
        bias = library.language_model.encoder.block[0].layer[0].SelfAttention
        bias.relative_attention_bias.weight.normal_()
    return library


def mean_of_real(hidden_NLD):
    return torch.stack([row[:n].mean(0) for row, n in zip(hidden_NLD, (11, 4), strict=True)])


@pytest.mark.parametrize("feed_forward", ["gated-gelu", "relu"])
def test_features_equal_the_librarys_own(feed_forward, tmp_path):
    library = t5_library(feed_forward_proj=feed_forward)
    library.save_pretrained(tmp_path)
    backbone = Blip2Backbone.load(
        str(tmp_path), settings={"text": "language_model"}, modalities=("image", "text")
    ).eval()
    with torch.no_grad():
        hidden = library.language_model.encoder(**TEXT).last_hidden_state
        query = library.qformer(
            query_embeds=library.query_tokens.expand(2, -1, -1),
            encoder_hidden_states=library.vision_model(**INPUTS["image"]).last_hidden_state,
        ).last_hidden_state
        text, _ = backbone.encode("text", TEXT)
        image, _ = backbone.encode("image", INPUTS["image"])
    assert torch.allclose(text, mean_of_real(hidden), atol=1e-5)
    assert torch.allclose(image, library.language_projection(query).mean(1), atol=1e-5)
    assert not torch.allclose(text[0], text[1], atol=1e-2)
    assert not any("decoder" in name for name, _ in backbone.named_parameters())


class Front:
    """Three tokens in front of the text."""

    prefix = 3

    def __init__(self, tokens_PD):
        self.tokens_PD = tokens_PD

    def before(self, layer, x_NLD, mask_NL):
        if layer > 0:
            return x_NLD, mask_NL
        ones = torch.ones(len(x_NLD), 3, dtype=torch.bool)
        front = self.tokens_PD.expand(len(x_NLD), -1, -1)
        return torch.cat([front, x_NLD], 1), torch.cat([ones, mask_NL], 1)

    def keys_values(self, layer):
        return None

    def after(self, layer, x_NLD, mask_NL):
        return x_NLD


def test_tokens_in_front_are_where_the_library_puts_embeddings_in_front():
    library = t5_library()
    backbone = Blip2Backbone(SETTINGS, blip2=library).eval()
    front_PD = torch.randn(3, 16)
    with torch.no_grad():
        found, _ = backbone.encode("text", TEXT, Front(front_PD))
        embedded = library.language_model.encoder.embed_tokens(TEXT["input_ids"])
        hidden = library.language_model.encoder(
            inputs_embeds=torch.cat([front_PD.expand(2, -1, -1), embedded], 1),
            attention_mask=torch.cat([torch.ones(2, 3), MASK_NL], 1).long(),
        ).last_hidden_state[:, 3:]
        plain, _ = backbone.encode("text", TEXT)
    assert torch.allclose(found, mean_of_real(hidden), atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-2)


def test_extra_pairs_have_no_distance_bias():
    """Two own keys, the second one padding, and one extra: softmax of (0, 2 ln 2 + ln 3)."""
    one, zero = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    own = torch.tensor([[[1.0], [50.0]]])
    query = torch.full((1, 2, 1), 2 * torch.log(torch.tensor(2.0)))
    bias = torch.log(torch.tensor([[3.0, 9.0], [1.0, 9.0]]))[None, None]
    found = attend(
        query,
        own,
        own,
        num_heads=1,
        extra=(zero, -one),
        mask_NL=torch.tensor([[True, False]]),
        scale=1.0,
        bias_1HQL=bias,
    )
    # weights 1 : 4 * 3 and 1 : 4 * 1 of the values -1 and 1
    assert found.flatten().tolist() == pytest.approx([11 / 13, 3 / 5])


def test_adapters_on_its_projections_start_as_the_plain_model():
    def model_of(**fields):
        torch.manual_seed(0)
        config = MultimodalMoEConfig(
            backbone="blip2", backbone_config=SETTINGS, moe=None, num_labels=2, **fields
        )
        return build_model(config).eval()

    model = model_of(lora={"r": 2})
    model.merge_lora()
    plain = model_of()
    plain.load_state_dict(model.state_dict())
    adapted = model_of(lora={"r": 2})
    places = {n.split(".lora_")[0] for n, _ in adapted.named_parameters() if ".lora_" in n}
    text = sorted(place for place in places if "towers.text" in place)
    parts = ("key", "out", "query", "value")
    assert text == [
        f"backbone.towers.text.blocks.{i}.attention.{p}" for i in range(3) for p in parts
    ]
    present = torch.ones(2, 2, dtype=torch.bool)
    inputs = {"image": INPUTS["image"], "text": TEXT}
    found, expected = (m(present, inputs).features["text"] for m in (adapted, plain))
    assert torch.allclose(found, expected, atol=1e-6)
    found.square().sum().backward()
    gradients = {n: p.grad for n, p in adapted.named_parameters() if f"{text[0]}.lora_B" in n}
    assert all(grad.abs().max() > 0 for grad in gradients.values())


@pytest.mark.parametrize("prompt", sorted(set(PROMPTS) - {"none"}))
def test_every_prompt_acts_on_it(prompt):
    torch.manual_seed(0)
    config = MultimodalMoEConfig(
        backbone="blip2", backbone_config=SETTINGS, prompt=prompt, moe=None, num_labels=2
    )
    model = build_model(config).eval()
    with torch.no_grad():
        for parameter in model.prompt.parameters():
            parameter.normal_(std=0.3)
    present = torch.ones(2, 2, dtype=torch.bool)
    features = model(present, {"image": INPUTS["image"], "text": TEXT}).features["text"]
    plain, _ = model.backbone.encode("text", TEXT)
    assert features.isfinite().all()
    assert not torch.allclose(features, plain, atol=1e-4)
