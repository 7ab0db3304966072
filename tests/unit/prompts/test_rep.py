"""REP against its released computation written down once more, sample by sample, with loops."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mm_moe.errors import ConfigError
from mm_moe.models import MultimodalMoEConfig, MultimodalMoEModel, build_model, processors_for
from mm_moe.registry import PROMPTS
from prompts.rep_code import RepCodePrompt
from prompts.rep_fixed import RepFixedPrompt

torch.set_num_threads(1)
SMALL = {"width": 16, "num_blocks": 4, "hidden": 24, "projection": 8, "vocab_size": 50}
PAIR = {"widths": {"image": 6, "text": 4}, "num_blocks": {"image": 4, "text": 4}}
PAIR |= {"modalities": ("image", "text")}
OPTIONS = {"length": 3, "common_width": 16, "hidden": 10, "layers": 3}
COMPLETE, TEXT_MISSING, IMAGE_MISSING = [True, True], [True, False], [False, True]


def model_of(**options):
    torch.manual_seed(0)
    config = MultimodalMoEConfig(
        backbone_config=SMALL,
        label_names=["x", "y"],
        prompt="rep_code",
        prompt_config=OPTIONS | options,
        feature_norm=False,
    )
    return build_model(config).eval()


def residual(generator, x):
    y = F.gelu(F.layer_norm(x @ generator.down.weight.T + generator.down.bias, (10,)))
    skip = x if isinstance(generator.skip, nn.Identity) else generator.skip(x)
    return generator.up(y) + skip


def buffers(prompt, has_image, has_text):
    """Private tokens of each block and shared tokens: image and text, by the source's tables."""
    image = prompt.states["image"][int(has_image)]  # V_m, V_c
    text = prompt.states["text"][int(has_text)]  # T_m, T_c
    alpha = prompt.share.item()
    images, texts = [], []
    for block in range(3):
        u = F.layer_norm(torch.cat([image, text], -1), (32,))
        new_image = residual(prompt.generators["image"][block], u)
        new_text = residual(prompt.generators["text"][block], u)
        if block > 0:
            new_image = alpha * new_image + (1 - alpha) * image
            new_text = alpha * new_text + (1 - alpha) * text
        image, text = new_image, new_text
        images.append(image)
        texts.append(text)
    common = prompt.common[{(1, 0): 0, (0, 1): 1, (1, 1): 2}[has_image, has_text]]
    shared = [residual(prompt.common_generators[name], common) for name in ("image", "text")]
    return (images, shared[0]), (texts, shared[1])


def multihead(attention, query, x):
    """The library's attention with one head, filled with our weights."""
    library = nn.MultiheadAttention(16, 1, batch_first=True)
    parts = (attention.query.weight, attention.key.weight, attention.value.weight)
    library.in_proj_weight.data = torch.cat(parts)
    library.in_proj_bias.data = torch.cat(
        [attention.query.bias, torch.zeros(16), attention.value.bias]
    )
    library.out_proj.load_state_dict(attention.out.state_dict())
    return library(query[None], x[None], x[None])[0][0]


def tower_feature(model, name, payload, blocks, shared, pattern):
    tower, prompt = model.backbone.towers[name], model.prompt
    x = tower.embed(payload)[0][0]
    dynamic = multihead(prompt.attention[name], prompt.queries[name][pattern], x)
    x = torch.cat([blocks[0], shared, dynamic, x])
    for index in range(4):
        if 0 < index < 3:
            x = torch.cat([blocks[index], x[3:6], x[6:]])
        x = tower.block(index, x[None])[0][0]
    x = x[9:]  # without the prompt
    place = 0 if name == "image" else int((payload["input_ids"][0] == 1).nonzero()[0])
    return tower.projection(tower.norm_out(x[place]))


def test_rep_code_computes_what_the_source_computes():
    model = model_of(attend_padding=True)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():  # norms stay at 1 and 0, as `residual` has them
        for path, parameter in model.prompt.named_parameters():
            if "norm" not in path:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    present = [COMPLETE, TEXT_MISSING, IMAGE_MISSING]
    pixels = torch.randn(2, 3, 64, 64, generator=generator)
    ids = torch.tensor([[0, 7, 9, 1, 2], [0, 8, 1, 2, 2]])
    text = {"input_ids": ids, "attention_mask": (ids != 2).long()}
    logits = model(torch.tensor(present), {"image": {"pixel_values": pixels}, "text": text}).logits
    rows = [(0, 0), (1, None), (None, 1)]
    for b, (image_row, text_row) in enumerate(rows):
        pattern = sum(2**m for m in range(2) if present[b][m]) - 1
        (images, image_shared), (texts, text_shared) = buffers(model.prompt, *present[b])
        z = torch.zeros(2, 8)
        if image_row is not None:
            payload = {"pixel_values": pixels[image_row : image_row + 1]}
            z[0] = tower_feature(model, "image", payload, images, image_shared, pattern)
        if text_row is not None:
            payload = {k: v[text_row : text_row + 1] for k, v in text.items()}
            z[1] = tower_feature(model, "text", payload, texts, text_shared, pattern)
        assert torch.allclose(logits[b], model.head(z.flatten()), atol=1e-4)


def test_texts_filled_up_as_in_the_release_give_its_numbers():
    """The dynamic group attends to all positions of the tower, whatever the batch holds."""
    torch.manual_seed(0)
    config = MultimodalMoEConfig(
        backbone_config=SMALL | {"vocab_size": 4096},
        label_names=["x", "y"],
        prompt="rep_code",
        prompt_config=OPTIONS | {"attend_padding": True},
        feature_norm=False,
        pad_text=0,
    )
    model = build_model(config).eval()
    process = processors_for(config)["text"]
    both = process(["a pear", "a house with a red door and a cat"])
    assert both["input_ids"].shape == (2, 24)
    alone = {name: rows[:1] for name, rows in both.items()}
    assert all(torch.equal(process(["a pear"])[name], rows) for name, rows in alone.items())

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, parameter in model.prompt.named_parameters():
            if "norm" not in path:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    _, (texts, shared) = buffers(model.prompt, *IMAGE_MISSING)
    expected = tower_feature(model, "text", alone, texts, shared, 1)
    found = model(torch.tensor([IMAGE_MISSING] * 2), {"text": both}).features["text"][0]
    assert torch.allclose(found, expected, atol=1e-4)
    length = int(alone["attention_mask"].sum())
    cut = {name: rows[:, :length] for name, rows in alone.items()}  # not as in the release
    assert not torch.allclose(
        model(torch.tensor([IMAGE_MISSING]), {"text": cut}).features["text"][0], expected, atol=1e-4
    )


def test_the_published_number_of_trained_values():
    names = ("image", "text")
    prompt = RepCodePrompt(
        widths={"image": 768, "text": 512}, num_blocks=dict.fromkeys(names, 12), modalities=names
    )
    trained = sum(p.numel() for p in prompt.parameters() if p.requires_grad)
    # the source's 17,935,617 without the 1,115,904 of a network that it never calls
    assert trained == 17_935_617 - 1_115_904


def test_private_tables_start_at_the_towers_own_tokens():
    model = model_of()
    towers, states = model.backbone.towers, model.prompt.states
    anchors = {
        "image": towers["image"].class_embedding,
        "text": towers["text"].token_embedding.weight[1],
    }
    for name, anchor_D in anchors.items():
        distance = (states[name] - anchor_D).norm(dim=-1)
        assert torch.allclose(distance, torch.full_like(distance, 0.2), atol=1e-5)


def test_fixed_noise_is_relative_in_every_table():
    prompt = RepFixedPrompt(**PAIR, length=2, common_width=8)
    anchor_D = torch.tensor([0.0, 3, 0, 4, 0, 0])
    prompt.anchor({"image": anchor_D})
    distance = (prompt.states["image"] - anchor_D).norm(dim=-1)
    assert torch.allclose(distance, torch.full_like(distance, 0.2 * 5), atol=1e-5)
    assert prompt.common.norm(dim=-1).max() <= 1.2 + 1e-5
    assert RepCodePrompt(**PAIR).common.norm(dim=-1).min() > 3  # .2 * sqrt(512) = 4.5


def test_what_is_trained_by_default():
    def frozen(prompt):
        return {n.split(".")[0] for n, p in prompt.named_parameters() if not p.requires_grad}

    assert frozen(RepCodePrompt(**PAIR)) == {"queries", "attention"}
    assert frozen(RepFixedPrompt(**PAIR)) == set()
    assert frozen(RepFixedPrompt(**PAIR, train_attention=False)) == {"attention"}


def test_the_share_is_bounded_and_not_decayed_in_the_fixed_one():
    code, fixed = RepCodePrompt(**PAIR), RepFixedPrompt(**PAIR)
    assert (code.share.ndim, fixed.share.ndim) == (2, 1)  # two dimensions are decayed
    with torch.no_grad():
        fixed.share.fill_(50.0)
    old, new = torch.zeros(1, 2, 4), torch.ones(1, 2, 4)
    assert torch.equal(fixed._mixed(1, new, old), new)
    assert torch.equal(code._mixed(1, new, old), new / 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 5}, r"\(5\) must lie between 0"),
        ({"hidden": 0}, r"hidden \(0\)"),
        ({"dropout": 1.0}, r"dropout \(1.0\)"),
        ({"private": False, "shared": False, "dynamic": False}, "every group"),
        ({"lenght": 2}, "did you mean length"),
    ],
)
def test_wrong_options_give_numbers(options, message):
    with pytest.raises(ConfigError, match=message):
        RepCodePrompt(**PAIR, **options)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_saved_model_comes_back_with_its_prompt(prompt, tmp_path):
    """Frozen tables too; and a prompt that the folder lacks starts at the towers' own tokens."""
    torch.manual_seed(0)
    config = MultimodalMoEConfig(backbone_config=SMALL, label_names=["x", "y"], prompt=prompt)
    model = build_model(config).eval()
    model.save_pretrained(tmp_path)
    torch.manual_seed(1)
    again = MultimodalMoEModel.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    trained = {n: p.requires_grad for n, p in model.named_parameters()}
    assert {n: p.requires_grad for n, p in again.named_parameters()} == trained
    if prompt == "none":
        config.prompt = "rep_code"
        new = MultimodalMoEModel.from_pretrained(tmp_path, config=config)
        distance = new.prompt.states["text"] - new.backbone.towers["text"].anchor()
        assert torch.allclose(distance.norm(dim=-1), torch.tensor(0.2), atol=1e-5)
        assert not new.prompt.queries["text"].requires_grad
        assert new.prompt.queries["text"].std() == pytest.approx(0.02, rel=0.2)
