"""The assembled model: presence, sparsity, freezing, and taking over weights."""

import pytest
import torch

from mm_moe.backbones.weights import save_weights
from mm_moe.errors import CheckpointError, ConfigError, DataError
from mm_moe.models import MultimodalMoEConfig, MultimodalMoEModel, build_model
from mm_moe.moe.layer import moe_layers

torch.set_num_threads(1)
SMALL = {"width": 16, "num_blocks": 4, "hidden": 24, "projection": 8, "vocab_size": 50}
SPARSE = {"num_experts": 3, "top_k": 1}


def model_of(**fields) -> MultimodalMoEModel:
    torch.manual_seed(0)
    fields = {"backbone_config": SMALL, "label_names": ["x", "y", "z"]} | fields
    return build_model(MultimodalMoEConfig(**fields)).eval()


def batch_of(present: list[list[bool]]) -> dict:
    present_BM = torch.tensor(present, dtype=torch.bool).view(-1, 2)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(len(present_BM), 3, 64, 64, generator=generator)
    ids = torch.randint(3, 50, (len(present_BM), 6), generator=generator)
    ids[:, 0], ids[:, 4], ids[:, 5] = 0, 1, 2
    inputs = {}
    if present_BM[:, 0].any():
        inputs["image"] = {"pixel_values": pixels[present_BM[:, 0]]}
    if present_BM[:, 1].any():
        text = ids[present_BM[:, 1]]
        inputs["text"] = {"input_ids": text, "attention_mask": (text != 2).long()}
    return {"present": present_BM, "inputs": inputs}


BOTH, IMAGE_ONLY, TEXT_ONLY = [True, True], [True, False], [False, True]


def test_no_prompt_is_the_plain_backbone_exactly():
    model, batch = model_of(), batch_of([BOTH, BOTH])
    output = model(**batch)
    for name in ("image", "text"):
        plain, _ = model.backbone.encode(name, batch["inputs"][name])
        assert torch.equal(output.features[name], plain)
    assert output.losses == {}
    assert output.routing == {}


def test_absent_rows_are_zero_and_present_rows_in_their_place():
    model = model_of()
    batch = batch_of([TEXT_ONLY, BOTH, IMAGE_ONLY])
    features = model(**batch).features
    assert not features["image"][0].any()
    assert not features["text"][2].any()
    plain, _ = model.backbone.encode("image", batch["inputs"]["image"])
    assert torch.equal(features["image"][[1, 2]], plain)


@pytest.mark.parametrize("prompt", ["none", "missing_aware", "replay"])
def test_a_batch_equals_its_samples_one_by_one(prompt):
    model = model_of(prompt=prompt, moe=SPARSE)
    batch = batch_of([TEXT_ONLY, BOTH, IMAGE_ONLY])
    together = model(**batch).logits
    image, text = batch["inputs"]["image"]["pixel_values"], batch["inputs"]["text"]
    for b, (i, t) in enumerate([(None, 0), (0, 1), (1, None)]):
        inputs = {} if i is None else {"image": {"pixel_values": image[i : i + 1]}}
        if t is not None:
            inputs["text"] = {k: v[t : t + 1] for k, v in text.items()}
        alone = model(batch["present"][b : b + 1], inputs).logits
        assert torch.allclose(alone[0], together[b], atol=1e-5)


@pytest.mark.parametrize("prompt", ["none", "missing_aware", "replay"])
@pytest.mark.parametrize("rows", [[IMAGE_ONLY], [TEXT_ONLY, TEXT_ONLY], []])
def test_a_batch_without_a_modality_has_the_same_graph(prompt, rows):
    model = model_of(prompt=prompt, moe=SPARSE)
    output = model(**batch_of(rows))
    (output.logits.sum() + sum(output.losses.values())).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert output.logits.shape == (len(rows), 3)
    full = model(**batch_of([BOTH]))
    assert list(output.routing) == list(full.routing)


def test_every_second_block_is_sparse_and_starts_as_the_dense_model():
    dense, sparse = model_of(), model_of(moe=SPARSE)
    sparse.head.load_state_dict(dense.head.state_dict())
    layers = [name.split("towers.")[1] for name in moe_layers(sparse)]
    assert layers == [f"{m}.layers.{i}.mlp" for m in ("image", "text") for i in (1, 3)]
    batch = batch_of([BOTH, IMAGE_ONLY])
    assert torch.allclose(sparse(**batch).logits, dense(**batch).logits, atol=1e-5)
    output = sparse(**batch)
    assert list(output.routing) == ["image.1", "image.3", "text.1", "text.3"]
    assert output.routing["image.1"].tokens_E.sum() == 2 * 17
    assert output.routing["text.1"].tokens_E.sum() == 5  # padding is not routed


def test_router_losses_are_means_over_the_layers():
    output = model_of(moe=SPARSE)(**batch_of([BOTH]))
    each = [record.losses["load_balance"] for record in output.routing.values()]
    assert output.losses["load_balance"].item() == pytest.approx(sum(each).item() / 4)


@pytest.mark.parametrize(
    ("moe_layers_", "expected"),
    [([0, -1], [0, 3, 0, 3]), ({"text": [2]}, [2]), ([], [])],
)
def test_sparse_blocks_can_be_chosen(moe_layers_, expected):
    model = model_of(moe=SPARSE, moe_layers=moe_layers_)
    assert [int(name.split(".")[4]) for name in moe_layers(model)] == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [1, 3]),
        ({"moe_mode": "sparse"}, [1, 3]),
        ({"moe_mode": "dense"}, [0, 1, 2, 3]),
        ({"moe_mode": "first_half"}, [0, 1]),
        ({"moe_mode": "second_half"}, [2, 3]),
        ({"moe_every": 3}, [2]),
        ({"moe_every": 5}, []),
        ({"moe_mode": "dense", "moe_layers": [0]}, [0]),
    ],
)
def test_modes_choose_blocks(fields, expected):
    config = MultimodalMoEConfig(moe=SPARSE, num_labels=1, **fields)
    assert config.sparse_blocks("image", 4) == expected
    halves = [
        MultimodalMoEConfig(moe=SPARSE, moe_mode=f"{half}_half") for half in ("first", "second")
    ]
    assert [half.sparse_blocks("text", 5) for half in halves] == [[0, 1], [2, 3, 4]]


def experts_of(model):
    return {
        name.split("towers.")[1]: layer.num_experts for name, layer in moe_layers(model).items()
    }


def test_a_pyramid_has_its_own_number_of_experts_in_each_block_and_rebuilds(tmp_path):
    model = model_of(moe={"num_experts": [2, 5], "top_k": 2}, moe_mode="second_half")
    assert experts_of(model) == {
        f"{m}.layers.{i}.mlp": n for m in ("image", "text") for i, n in ((2, 2), (3, 5))
    }
    model.save_pretrained(tmp_path)
    again = MultimodalMoEModel.from_pretrained(tmp_path).eval()
    assert experts_of(again) == experts_of(model)
    batch = batch_of([BOTH])
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert again.config.moe["num_experts"] == [2, 5]
    config = MultimodalMoEConfig(num_labels=2, moe=model.config.moe, moe_mode="second_half")
    taken = build_model(config, pretrained=str(tmp_path))
    assert experts_of(taken) == experts_of(model)
    config = MultimodalMoEConfig(num_labels=2, moe={"num_experts": [5, 2]}, moe_mode="second_half")
    with pytest.raises(CheckpointError, match=r"\[2, 5\] experts, moe_mode second_half.*\[5, 2\]"):
        build_model(config, pretrained=str(tmp_path))


def test_one_number_stays_a_number_and_old_configurations_load():
    assert MultimodalMoEConfig(moe={"num_experts": [4]}).moe["num_experts"] == 4
    old = MultimodalMoEConfig(moe=SPARSE).to_dict()
    for key in ("moe_mode", "moe_every", "upcycle_drop"):
        del old[key]
    assert MultimodalMoEConfig.from_dict(old).sparse_blocks("image", 4) == [1, 3]


def test_dropped_units_make_the_experts_differ():
    torch.manual_seed(0)
    layers = moe_layers(model_of(moe=SPARSE, upcycle_drop=0.5)).values()
    for layer in layers:
        changed_F = (layer.experts.w_out[0] != layer.experts.w_out[1]).any(1)
        assert 12 <= changed_F.sum() <= 24  # two halves of 24 units


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"moe_mode": "thirds"}, "unknown moe_mode 'thirds'"),
        ({"moe_every": 0}, r"moe_every \(0\)"),
        ({"upcycle_drop": 1.1}, r"upcycle_drop \(1.1\)"),
        ({"upcycle_noise": -0.1}, r"upcycle_noise \(-0.1\)"),
        ({"moe": {"num_experts": []}}, "empty list"),
        ({"moe": {"num_experts": [4, 2], "top_k": 3}}, r"top_k \(3\).*\(2\)"),
        (
            {"moe": {"num_experts": [4, 2, 2]}},
            r"3 numbers \(4 2 2\), the image tower has 2 sparse blocks \(1, 3\)",
        ),
        ({"backbone": "smal_clip"}, "did you mean small_clip"),
        ({"prompt": "repaly"}, "did you mean replay"),
        ({"prompt": "replay", "prompt_config": {"lenght": 3}}, "did you mean length"),
        ({"prompt": "missing_aware", "prompt_config": {"lenght": 3}}, "did you mean length"),
        ({"prompt": "none", "prompt_config": {"length": 3}}, "unknown none option 'length'"),
        ({"moe": {"num_expert": 3}}, "did you mean num_experts"),
        ({"moe": SPARSE, "moe_layers": [4]}, r"block 4 of the image tower, which has 4 blocks"),
        ({"moe": SPARSE, "moe_layers": {"sound": [1]}}, "names 'sound'"),
        ({"num_labels": 2}, r"num_labels \(2\).*label_names \(3\)"),
        ({"prompt": "replay", "prompt_config": {"cache_layers": 4}}, r"\(4\).* 1 and 3"),
    ],
)
def test_wrong_settings_say_what_to_do(fields, message):
    with pytest.raises(ConfigError, match=message):
        model_of(**fields)


def test_rows_that_do_not_match_presence_are_counted():
    batch = batch_of([BOTH, BOTH])
    batch["present"][0, 0] = False
    with pytest.raises(DataError, match="2 rows of 'image', but 1 of its 2 samples"):
        model_of()(**batch)
    with pytest.raises(DataError, match=r"shape \(1, 3\), not \(B, 2\)"):
        model_of()(torch.ones(1, 3, dtype=torch.bool), {})


def test_without_labels_there_is_a_logit_scale_and_no_head():
    model = model_of(label_names=None, num_labels=0)
    output = model(**batch_of([BOTH, BOTH]))
    assert output.logits is None
    assert output.features["text"].shape == (2, 8)
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07, rel=1e-3)
    assert model_of().logit_scale is None


def test_freezing_leaves_prompts_routers_experts_and_head():
    model = model_of(moe=SPARSE, prompt="replay")
    everything = dict(model.trainable_report())
    assert sum(everything.values()) == sum(p.numel() for p in model.parameters())
    model.freeze(("image",))
    report = dict(model.trainable_report())
    assert report["image tower"] == 0
    assert {k: v for k, v in report.items() if k != "image tower"} == {
        k: v for k, v in everything.items() if k != "image tower"
    }
    model.freeze(("image", "text"), experts=True)
    report = dict(model.trainable_report())
    assert {k for k, v in report.items() if v} == {
        "image routers",
        "text routers",
        "prompt",
        "head",
    }
    assert report["image routers"] == 2 * 16 * 3  # two layers, width x experts
    assert report["head"] == 3 * 16 + 3
    with pytest.raises(ConfigError, match="cannot lock 'audio'"):
        model.freeze(("audio",))


def test_the_prompt_can_start_from_the_tasks_own_tokens():
    model = model_of(prompt="replay", prompt_config={"noise": 1e-6})
    batch = batch_of([BOTH, IMAGE_ONLY])
    model.initialise_prompt([batch])
    x_NLD, mask_NL = model.backbone.towers["text"].embed(batch["inputs"]["text"])
    mean_D = x_NLD[mask_NL].mean(0)
    part = model.prompt.towers["text"]
    assert torch.allclose(part.private_KnD, mean_D.expand_as(part.private_KnD), atol=1e-5)
    shared = part.from_shared(model.prompt.shared_KnC)
    assert torch.allclose(shared, mean_D.expand_as(shared), atol=1e-5)


def test_pretrained_weights_come_before_the_experts(tmp_path):
    dense = model_of()
    save_weights(dense.backbone, tmp_path / "w.safetensors", dtype=torch.float32)
    config = MultimodalMoEConfig(backbone_config=SMALL, moe=SPARSE, num_labels=0)
    model = build_model(config, pretrained=str(tmp_path / "w.safetensors"))
    batch = batch_of([BOTH])
    for name, feature in dense(**batch).features.items():
        assert torch.allclose(model(**batch).features[name], feature, atol=1e-5)
    w_in = moe_layers(model.backbone)["towers.text.layers.1.mlp"].experts.w_in
    assert torch.equal(w_in[2], dense.backbone.towers["text"].layers[1].mlp.fc1.weight.T)


@pytest.mark.parametrize("moe", [None, SPARSE])
def test_a_pretrained_model_of_ours_gives_its_backbone(moe, tmp_path):
    source = model_of(label_names=None, num_labels=0, moe=moe)
    source.save_pretrained(tmp_path)
    config = MultimodalMoEConfig(
        label_names=["x", "y"], moe=SPARSE, prompt="replay", backbone_config={"width": 16}
    )
    model = build_model(config, pretrained=str(tmp_path)).eval()
    assert model.config.backbone_config["num_blocks"] == 4
    batch = batch_of([BOTH])
    for name in ("image", "text"):
        feature, _ = model.backbone.encode(name, batch["inputs"][name])
        assert torch.allclose(feature, source(**batch).features[name], atol=1e-5)


def test_a_pretrained_model_that_does_not_fit_is_refused(tmp_path):
    model_of(label_names=None, num_labels=0, moe=SPARSE).save_pretrained(tmp_path)
    config = MultimodalMoEConfig(label_names=["x", "y"], moe={"num_experts": 2})
    with pytest.raises(CheckpointError, match=r"3 experts.*'num_experts': 2"):
        build_model(config, pretrained=str(tmp_path))
    config = MultimodalMoEConfig(num_labels=2, moe=SPARSE, backbone_config={"width": 32})
    with pytest.raises(ConfigError, match=r"width \(32\) differs.*\(16\)"):
        build_model(config, pretrained=str(tmp_path))
    config = MultimodalMoEConfig(num_labels=2, moe=SPARSE, modalities=["image"])
    with pytest.raises(ConfigError, match="with image, text, asked for"):
        build_model(config, pretrained=str(tmp_path))


class Spy:
    """Stands for a layer's router and notes what it is told."""

    def __init__(self, layer):
        self.router, self.seen = layer.router, []
        layer.router.register_forward_pre_hook(lambda _, arguments: self.seen.append(arguments[1]))


def test_routers_are_told_modality_combination_and_interaction():
    model = model_of(moe=SPARSE)
    layers = moe_layers(model.backbone)
    image = Spy(layers["towers.image.layers.1.mlp"]).seen
    text = Spy(layers["towers.text.layers.3.mlp"]).seen
    model(**batch_of([TEXT_ONLY, BOTH]), interaction=torch.tensor([2, 1]))
    assert [image[0].modality, text[0].modality] == [0, 1]
    assert image[0].combination_T.tolist() == [3] * 17
    assert text[0].combination_T.tolist() == [2] * 5 + [3] * 5  # of six text tokens one is padding
    assert text[0].interaction_T.tolist() == [2] * 5 + [1] * 5
    model(**batch_of([TEXT_ONLY]))
    assert image[1].combination.tolist() == [3]  # the blank row, which has no real token
    assert image[1].combination_T.tolist() == []
    assert image[1].interaction is None
    with pytest.raises(DataError, match=r"shape \(1,\); the batch has 2 samples"):
        model(**batch_of([BOTH, BOTH]), interaction=torch.tensor([1]))


def test_hard_routers_get_their_number_of_groups_from_the_model():
    experts = {"by_modality": 2, "by_combination": 3, "by_interaction": 4}
    for router, num_experts in experts.items():
        model = model_of(moe={"num_experts": num_experts, "router": router})
        output = model(**batch_of([TEXT_ONLY, BOTH]), interaction=torch.tensor([2, 0]))
        rows = {name: record.tokens_E.tolist() for name, record in output.routing.items()}
        assert (
            rows["text.3"]
            == {
                "by_modality": [0, 10],
                "by_combination": [0, 5, 5],
                "by_interaction": [5, 0, 5, 0],
            }[router]
        )
        model(**batch_of([]))  # a rank without a sample says nothing of interactions
    with pytest.raises(DataError, match='key "interaction"'):
        model(**batch_of([BOTH]))
    with pytest.raises(ConfigError, match=r"num_experts \(4\).*3 combinations.*num_experts=3"):
        model_of(moe={"num_experts": 4, "router": "by_combination"})
