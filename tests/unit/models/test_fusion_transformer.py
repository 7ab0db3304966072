"""The fusion transformer: masks, residuals, sparse blocks, and its place in a model."""

import pytest
import torch
from torch import nn

from mm_moe.errors import ConfigError
from mm_moe.models.building import build_model
from mm_moe.models.configuration import MultimodalMoEConfig
from mm_moe.models.fusion import FusionSettings, new_head
from mm_moe.models.fusion_transformer import TransformerSettings
from mm_moe.models.modeling import MultimodalMoEModel
from mm_moe.models.output import mean_router_losses

torch.set_num_threads(1)
B, P, H, C = 3, 2, 8, 4
NAMES = ("labs", "genes", "notes")
PRESENT = torch.tensor([[True, True, True], [True, False, True], [False, True, False]])


def head_of(**options):
    torch.manual_seed(0)
    settings = FusionSettings(fusion="transformer", options={"num_heads": 2, **options})
    return new_head([P * H] * 3, C, settings, num_tokens=P, modalities=NAMES).eval()


def parts(seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(B, P * H, generator=generator).to(dtype) for _ in NAMES]
    return [part * PRESENT[:, m, None] for m, part in enumerate(found)]


@pytest.mark.parametrize("sparse", ["none", "all"])
def test_what_is_missing_plays_no_part(sparse):
    head = head_of(depth=2, sparse=sparse, num_experts=4, top_k=2)
    logits, _ = head.fuse(parts(), PRESENT)
    assert logits.shape == (B, C)
    other = [torch.where(PRESENT[:, m, None], x, 9.0) for m, x in enumerate(parts())]
    assert torch.equal(head.fuse(other, PRESENT)[0], logits)
    filled, _ = head.fuse(other, PRESENT, filled=True)
    assert torch.allclose(filled[0], logits[0], atol=1e-6)  # lacks nothing
    assert not torch.allclose(filled[1:], logits[1:], atol=1e-3)


def test_one_token_by_hand():
    head = head_of(depth=1, dropout=0.0)
    block, identity = head.blocks[0], torch.eye(H)
    with torch.no_grad():
        block.qkv.weight.copy_(torch.cat([torch.zeros(2 * H, H), identity]))  # equal attention
        block.out.weight.copy_(identity)
        block.out.bias.zero_()
        block.mlp.fc2.weight.zero_()
        block.mlp.fc2.bias.zero_()
    alone = torch.tensor([[True, False, False]])
    feature = torch.randn(1, P * H, generator=torch.Generator().manual_seed(4))
    seen = []
    head.mlp.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    head.fuse([feature, 0 * feature, 0 * feature], alone)
    tokens = feature.view(P, H)
    attended = nn.functional.layer_norm(tokens, (H,)).mean(0)
    assert torch.allclose(seen[0][0, :H], tokens.mean(0) + attended, atol=1e-5)
    assert not seen[0][0, H:].any()
    block.legacy_residual = True  # a + a in the place of X + a
    head.fuse([feature, 0 * feature, 0 * feature], alone)
    assert torch.allclose(seen[1][0, :H], 2 * attended, atol=1e-5)


def test_sparse_blocks_are_where_they_should_be():
    assert not head_of(depth=3).sparse_layers()
    some = head_of(depth=4, sparse="alternate", num_experts=4, top_k=1)
    assert list(some.sparse_layers()) == ["fusion.0", "fusion.2"]
    _, records = some.fuse(parts(), PRESENT)
    assert list(records) == ["fusion.0", "fusion.2"]
    # 6 present cells of 2 tokens, one expert each
    assert records["fusion.0"].tokens_E.sum() == 12
    assert set(mean_router_losses(records)) >= {"importance", "router_z"}
    _, records = some.fuse(parts(), PRESENT, filled=True)
    assert records["fusion.0"].tokens_E.sum() == 18


def test_a_router_knows_modality_and_combination():
    by_modality = head_of(sparse="all", num_experts=3, top_k=1, router="by_modality")
    _, records = by_modality.fuse(parts(), PRESENT)
    assert records["fusion.0"].tokens_E.tolist() == [4, 4, 4]  # each modality: 2 rows of 2 tokens
    by_pattern = head_of(sparse="all", num_experts=7, top_k=1, router="by_combination")
    _, records = by_pattern.fuse(parts(), PRESENT)
    # patterns 7 (all), 5 (labs, notes), 2 (genes), less one: 6, 4 and 2 tokens
    assert records["fusion.0"].tokens_E.tolist() == [0, 2, 0, 0, 4, 0, 6]


def test_gradients_reach_everything():
    head = head_of(depth=2, sparse="alternate", num_experts=2, top_k=2).train()
    logits, records = head.fuse(parts(), PRESENT)
    loss = nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2]))
    (loss + sum(mean_router_losses(records).values())).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
    still = [name for name, p in head.named_parameters() if not p.grad.any()]
    assert still == []


def test_a_batch_with_nothing_is_finite():
    head = head_of(depth=2, sparse="all", num_experts=2, top_k=1)
    logits, _ = head.fuse([0 * part for part in parts()], torch.zeros_like(PRESENT))
    assert torch.equal(logits, head.mlp[-1].bias.expand(B, C))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparse": "some"}, "unknown fusion_config.sparse"),
        ({"dept": 2}, "did you mean depth"),
        ({"depth": 0}, "at least 1"),
        ({"sparse": "all", "top_k": 17}, "top_k"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": "x"}, r"dropout \('x'\)"),
        ({"sparse": True}, "unknown fusion_config.sparse True"),
        ({"moe": [1]}, "an object of settings"),
        ({"legacy_residual": "no"}, "true or false"),
        ({"sparse": "all", "num_experts": "x"}, "wrong type"),
        ({"sparse": "all", "router": 7}, "wrong type"),
    ],
)
def test_wrong_options_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        TransformerSettings.from_dict(options)


def test_features_that_are_no_tokens_are_refused():
    settings = FusionSettings(fusion="transformer", options={"num_heads": 3})
    with pytest.raises(ConfigError, match="num_heads"):
        new_head([P * H] * 2, C, settings, num_tokens=P)
    with pytest.raises(ConfigError, match="one width"):
        new_head([P * H, H], C, settings, num_tokens=P)
    with pytest.raises(ConfigError, match="for --fusion transformer"):
        FusionSettings(options={"depth": 1})


def clinical_config():
    return MultimodalMoEConfig(
        backbone="clinical",
        backbone_config={
            "num_tokens": P,
            "token_width": H,
            "num_heads": 2,
            "sequences": {"labs": {"width": 5, "length": 1}, "vitals": {"width": 2, "length": 4}},
        },
        modalities=["labs", "vitals"],
        label_names=["alive", "dead"],
        fusion="transformer",
        fusion_options={"num_heads": 2, "sparse": "all", "num_experts": 4, "top_k": 2},
    )


def test_a_filled_modality_has_a_part_in_it():
    config = clinical_config()
    present = torch.tensor([[True, False]])
    inputs = {"labs": {"values": torch.ones(1, 1, 5), "mask": torch.ones(1, 1, dtype=torch.bool)}}
    tokens = {}
    for fill in (None, "default"):
        torch.manual_seed(0)
        config.fill = fill
        model = build_model(config).eval()
        tokens[fill] = model(present, inputs).routing["fusion.0"].tokens_E.sum().item()
    assert tokens == {None: P * 2, "default": 2 * P * 2}  # two experts for each token


def test_a_model_is_saved_and_loaded_whole(tmp_path):
    torch.manual_seed(0)
    model = build_model(clinical_config()).eval()
    assert list(model.sparse_layers()) == ["fusion.0"]
    present = torch.tensor([[True, True], [True, False], [False, True]])
    inputs = {
        "labs": {"values": torch.randn(2, 1, 5), "mask": torch.ones(2, 1, dtype=torch.bool)},
        "vitals": {"values": torch.randn(2, 4, 2), "mask": torch.ones(2, 4, dtype=torch.bool)},
    }
    output = model(present, inputs)
    assert output.logits.shape == (3, 2)
    assert "importance" in output.losses
    assert "fusion.0" in output.routing
    model.save_pretrained(tmp_path)
    again = MultimodalMoEModel.from_pretrained(tmp_path).eval()
    assert torch.equal(again(present, inputs).logits, output.logits)
    assert again.config.fusion_options == model.config.fusion_options
