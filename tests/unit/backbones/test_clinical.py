"""The encoders of the backbone `clinical`: shapes, gradients, and numbers by hand."""

import pytest
import torch

from mm_moe.backbones.clinical import KINDS, ClinicalBackbone
from mm_moe.backbones.clinical_tokens import PatchEmbedding
from mm_moe.errors import ConfigError, DataError
from mm_moe.models.sequence_processing import ArrayProcessor, SequenceProcessor

torch.set_num_threads(1)
P, H, ROWS = 3, 8, 2
NAN = float("nan")
SMALL_CLIP = {
    "config": {"width": 16, "num_blocks": 1, "hidden": 24, "projection": 8, "num_heads": 2}
}
EVENTS = {"variables": ["hr", "ph"], "mean": [80.0, 7.4], "std": [10.0, 0.2], "hours": 48.0}
SEQUENCES = {
    "table": {"width": 7, "length": 1},
    "dosage": {"width": 7, "length": 1},
    **{name: {"width": 2, "length": 7} for name in ("gru", "patches")},
    **{name: {"width": 3, "length": 9, "events": EVENTS} for name in ("event_set", "event_bins")},
}
ARRAYS = {name: {"shape": [6, 7, 5]} for name in ("volume", "slice_vit")}
OPTIONS = {"volume": {"channels": 2}, "slice_vit": {"slices": 2, **SMALL_CLIP}}
OPTIONS |= {"text": SMALL_CLIP, "image": SMALL_CLIP}
MASK = torch.tensor([[True] * 4, [True, True, False, False]])


def built(kind, **options):
    torch.manual_seed(0)
    towers = {kind: {"kind": kind, **OPTIONS.get(kind, {}), **options}}
    settings = {"num_tokens": P, "token_width": H, "num_heads": 2, "towers": towers}
    settings |= {"sequences": {k: v for k, v in SEQUENCES.items() if k == kind}}
    settings |= {"arrays": {k: v for k, v in ARRAYS.items() if k == kind}}
    return ClinicalBackbone(settings, modalities=(kind,)).eval()


def payload(kind):
    generator = torch.Generator().manual_seed(1)
    if kind in ("event_set", "event_bins"):
        events = torch.tensor([[1.0, 0, 90], [25, 1, 7.2], [25, 0, 70], [47, 1, 7.4]])
        return {"values": events.expand(ROWS, -1, -1).clone(), "mask": MASK}
    if kind == "text":
        ids = torch.tensor([[0, 5, 6, 1], [0, 5, 1, 2]])
        return {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])}
    if kind == "image":
        return {"pixel_values": torch.randn(ROWS, 3, 64, 64, generator=generator)}
    if kind in ("gru", "patches"):
        return {"values": torch.randn(ROWS, 4, 2, generator=generator), "mask": MASK}
    if kind == "dosage":
        return {"values": torch.tensor([[0.0, 1, 2, NAN, 3, -1, 1.5], [2.0, 2, 1, 0, 0, 1, NAN]])}
    if kind == "table":
        rows = torch.randn(ROWS, 7, generator=generator)
        rows[0, 2] = NAN
        return {"values": rows}
    return {"values": torch.randn(ROWS, 6, 7, 5, generator=generator)}


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_tokens_and_gradients(kind):
    backbone = built(kind)
    assert (backbone.num_tokens, backbone.token_width) == (P, H)
    feature, records = backbone.encode(kind, payload(kind))
    assert feature.shape == (ROWS, P * H) == (ROWS, backbone.feature_width(kind))
    assert feature.isfinite().all()
    assert not records
    blank, _ = backbone.encode(kind, None)
    assert blank.shape == (1, P * H)
    assert blank.isfinite().all()
    weight = torch.randn(feature.shape, generator=torch.Generator().manual_seed(3))
    (feature * weight).sum().backward()
    # the inner tower's own pooling is not read: its tokens are
    unread = ("projection", "layernorm", "norm_out") if kind in ("text", "image") else ()
    still = [
        name
        for name, value in backbone.named_parameters()
        if not (value.grad is not None and value.grad.isfinite().all() and value.grad.any())
        and not any(word in name for word in unread)
        and "key_value.bias" not in name  # its half of the keys cancels in the softmax
        and not name.endswith("k_proj.bias")
    ]
    assert still == []


@pytest.mark.parametrize("kind", ["table", "text", "slice_vit", "event_bins"])
def test_settings_build_it_again(kind):
    backbone = built(kind)
    again = ClinicalBackbone(backbone.settings, modalities=(kind,)).eval()
    assert again.settings == backbone.settings
    again.load_state_dict(backbone.state_dict())
    inputs = payload(kind)
    assert torch.equal(again.encode(kind, inputs)[0], backbone.encode(kind, inputs)[0])


def test_patches_are_filled_up_on_the_right():
    patches = PatchEmbedding(5, num_tokens=3, token_width=1)
    torch.nn.init.ones_(patches.project.weight)
    torch.nn.init.zeros_(patches.project.bias)
    tokens = patches(torch.tensor([[1.0, 2, 3, 4, 5]]))
    assert tokens.flatten().tolist() == [3.0, 7.0, 5.0]  # 1 + 2, 3 + 4, 5 + 0


def test_dosages_by_hand():
    encoder = built("dosage").towers["dosage"].encoder
    with torch.no_grad():
        encoder.dosage.copy_(torch.tensor([10.0, 20.0, 40.0]))
        encoder.not_called.fill_(7.0)
    seen = []
    encoder.patches.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    encoder({"values": torch.tensor([[0.0, 1, 2, 0.5, 1.5, NAN, 3]])})
    assert seen[0][0].tolist() == [10, 20, 40, 15, 30, 7, 7]


def test_a_missing_cell_takes_its_columns_value():
    encoder = built("table").towers["table"].encoder
    with torch.no_grad():
        encoder.missing_D.copy_(torch.arange(7.0))
    rows = payload("table")["values"]
    filled = rows.clone()
    filled[0, 2] = 2.0
    assert torch.equal(encoder({"values": rows}), encoder({"values": filled}))


@pytest.mark.parametrize("kind", ["gru", "patches", "event_set", "event_bins"])
def test_padding_is_not_read(kind):
    backbone, inputs = built(kind), payload(kind)
    kept = backbone.encode(kind, inputs)[0]
    inputs["values"][1, 2:] = 1e6
    assert torch.equal(backbone.encode(kind, inputs)[0], kept)
    short = {"values": inputs["values"][1:, :2], "mask": MASK[1:, :2]}
    assert torch.allclose(backbone.encode(kind, short)[0], kept[1:], atol=1e-6)


@pytest.mark.parametrize("kind", ["event_set", "event_bins"])
def test_the_order_of_events_plays_no_part(kind):
    backbone, inputs = built(kind), payload(kind)
    kept = backbone.encode(kind, inputs)[0]
    order = torch.tensor([2, 0, 3, 1])
    other = {"values": inputs["values"][:, order], "mask": inputs["mask"][:, order]}
    assert torch.allclose(backbone.encode(kind, other)[0], kept, atol=1e-6)


def test_events_on_a_grid_by_hand():
    encoder = built("event_bins").towers["event_bins"].encoder  # three bins of 16 hours
    events = torch.tensor([[[1.0, 0, 90], [2, 0, 100], [20, 1, 7.2], [47, 0, 70]]])
    grid = encoder.grid({"values": events, "mask": torch.ones(1, 4, dtype=torch.bool)})
    # hr: (1 + 2) / 2 standardised, carried on, then -1; ph: unseen, -1, carried on
    wanted = [[1.5, 0, 1, 0], [1.5, -1, 0, 1], [-1, -1, 1, 0]]
    assert torch.allclose(grid[0], torch.tensor(wanted), atol=1e-5)


def test_an_event_of_an_unknown_variable_is_refused():
    inputs = payload("event_set")
    inputs["values"][0, 0, 1] = 2
    with pytest.raises(DataError, match="variable 0 to 1"):
        built("event_set").encode("event_set", inputs)


def test_a_gru_token_is_the_mean_state_of_its_steps():
    encoder = built("gru").towers["gru"].encoder  # ceil(7 / 3) = 3 steps for each token
    inputs = payload("gru")
    tokens = encoder(inputs)
    assert encoder.steps == 3
    states, _ = encoder.gru(encoder.flagged(inputs)[0])
    assert torch.allclose(tokens[0, 0], states[0, :3].mean(0))
    assert torch.allclose(tokens[0, 1], states[0, 3])
    assert not tokens[0, 2].any()


def test_slices_are_the_middles_of_equal_parts():
    encoder = built("slice_vit", slices=2, axis=1).towers["slice_vit"].encoder
    volume = torch.arange(7.0).view(1, 1, 7, 1).expand(1, 6, 7, 5).contiguous()
    pictures = encoder.pictures({"values": volume})
    assert pictures.shape == (2, 3, 64, 64)
    assert pictures[:, 0, 0, 0].tolist() == [1.0, 5.0]  # 7 * 1 // 4, 7 * 3 // 4
    assert torch.equal(pictures[0, 0], pictures[0, 2])


def test_the_volume_of_the_atlas_ends_in_36_places():
    settings = {"num_tokens": 16, "arrays": {"image": {"shape": [91, 91, 109]}}}
    encoder = ClinicalBackbone(settings, modalities=("image",)).towers["image"].encoder
    assert encoder.left == (3, 3, 4)
    assert encoder.flat.in_features == 36 * 128
    assert encoder.patches.patch == 8


def test_kinds_follow_the_data():
    settings = {
        "sequences": {
            "labs": {"width": 4, "length": 1},
            "vitals": {"width": 4, "length": 9},
            "chart": {"width": 3, "length": 9, "events": EVENTS},
        },
        "arrays": {"image": {"shape": [8, 8, 8]}, "genes": {"shape": [11]}},
    }
    names = ("labs", "vitals", "chart", "image", "genes")
    towers = ClinicalBackbone(settings, modalities=names).towers
    kinds = [type(towers[name].encoder) for name in names]
    wanted = ["table", "gru", "event_set", "volume", "table"]
    assert kinds == [KINDS[kind] for kind in wanted]


def test_statistics_reach_the_processors():
    about = {"width": 2, "length": 1, "mean": [1.0, 2.0], "std": [2.0, 4.0]}
    settings = {
        "towers": {"dosage": {"kind": "dosage"}, "text": {"kind": "text"}},
        "sequences": {"table": about, "dosage": about},
        "arrays": {"volume": {"shape": [1, 1, 2], "mean": 3.0, "scale": 2.0}},
    }
    needs = ClinicalBackbone.processor_needs(settings)
    table = SequenceProcessor(needs.sequences["table"])([[[3.0, 10.0]]])
    assert table["values"].tolist() == [[[1.0, 2.0]]]
    counts = SequenceProcessor(needs.sequences["dosage"])([[[2.0, 1.0]]])
    assert counts["values"].tolist() == [[[2.0, 1.0]]]
    volume = ArrayProcessor(needs.arrays["volume"])([[[[3, 5]]]])
    assert volume["values"].tolist() == [[[[0.0, 1.0]]]]
    assert needs.vocab_size == 4096
    assert needs.source


def test_a_pretrained_inner_tower_can_be_locked_and_is_not_read_again():
    from mm_moe.backbones.clip_small import SmallClipBackbone
    from mm_moe.models import MultimodalMoEConfig, build_model
    from mm_moe.models.processing import processors_for

    config = MultimodalMoEConfig(
        backbone="clinical",
        backbone_config={
            "num_tokens": P,
            "token_width": H,
            "num_heads": 2,
            "towers": {"text": {"kind": "text", "pretrained": "builtin"}},
        },
        modalities=["text"],
        num_labels=2,
    )
    model = build_model(config)
    own = SmallClipBackbone.load("builtin", settings={}, modalities=("text",))
    inner = model.backbone.towers["text"].encoder.inner
    assert torch.equal(inner.token_embedding.weight, own.towers["text"].token_embedding.weight)
    assert "pretrained" not in config.backbone_config["towers"]["text"]
    tokens = processors_for(config)["text"](["no acute distress", "fever"])
    model.freeze(["text"])
    model(torch.ones(2, 1, dtype=torch.bool), {"text": tokens}).logits.sum().backward()
    assert not any(p.requires_grad for p in inner.parameters())
    pool = model.backbone.towers["text"].encoder.pool
    assert all(p.grad is not None for p in pool.parameters())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"token_width": 6}, "multiple of num_heads"),
        ({"num_tokens": 0}, "at least 1"),
        ({"tokens": 3}, "num_tokens"),
        ({"dropout": "x"}, r"dropout \('x'\)"),
        ({"sequences": ["a"]}, "object by modality"),
        ({"towers": {"table": {"kind": ["table"]}}}, r"unknown kind \['table'\]"),
        ({"towers": {"table": {"kind": "tabel"}}}, "did you mean table"),
        ({"towers": {"table": {"layers": 2}}}, "unknown clinical.towers.table option"),
        ({"towers": {"table": {"kind": "volume"}}}, "volumes are arrays"),
        ({"towers": {"table": {"kind": "event_set"}}}, "variables' names"),
        ({"towers": {"smell": {}}}, "say nothing of 'smell'"),
    ],
)
def test_wrong_settings_name_a_way_out(settings, words):
    name = "smell" if "smell" in settings.get("towers", {}) else "table"
    with pytest.raises(ConfigError, match=words):
        ClinicalBackbone(
            {"sequences": {"table": {"width": 5, "length": 1}}, **settings}, modalities=(name,)
        )


def test_options_of_a_misspelt_modality_are_refused():
    settings = {"sequences": {"static": {"width": 5, "length": 1}}}
    settings["towers"] = {"statik": {"kind": "table"}}
    with pytest.raises(ConfigError, match=r"options for 'statik'.*did you mean static"):
        ClinicalBackbone(settings, modalities=("static",))
