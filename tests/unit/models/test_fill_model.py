"""A fill inside the model: one tower call for own and support rows, saving, freezing, refusals."""

import pytest
import torch

from mm_moe.errors import ConfigError, DataError
from mm_moe.models import MultimodalMoEConfig, MultimodalMoEModel, build_model
from mm_moe.models.supports import joined
from mm_moe.registry import FILLS
from tests.fill_model import NAMES, PRESENT, batch_of, config_of, model_of, values_of

torch.set_num_threads(1)


def test_zeros_are_what_the_model_does_without_a_fill():
    one, two = model_of(None).eval()(**batch_of()), model_of("zero").eval()(**batch_of())
    assert torch.equal(one.logits, two.logits)


def test_supports_are_encoded_with_the_towers_own_rows_in_one_call():
    model = model_of(options={"legacy": True, "beta": 0.0}).eval()
    calls = []
    for tower in model.backbone.towers.values():
        embed = tower.embed
        tower.embed = lambda payload, embed=embed: (
            calls.append(len(payload["values"])) or embed(payload)
        )
    batch = batch_of()
    features = model(**batch).features
    assert calls == [
        int(PRESENT[:, m].sum()) + len(batch["supports"][name]["present"])
        for m, name in enumerate(NAMES)
    ]
    # sample 2 lacks `lab`: the mean of its supports' tokens, encoded as anybody's
    everyone = values_of(9, seed=3)
    rows = batch["supports"]["lab"]["index"][batch["supports"]["lab"]["rows"][0]]
    plain, _ = model.backbone.encode("lab", {"values": everyone["lab"][rows]})
    assert torch.allclose(features["lab"][2], plain.mean(0), atol=1e-6)
    for m, name in enumerate(NAMES):
        own, _ = model.backbone.encode(name, batch["inputs"][name])
        assert torch.allclose(features[name][PRESENT[:, m]], own, atol=1e-6)


def test_every_parameter_of_the_retriever_and_the_encoders_learns_from_the_task():
    model = model_of(options={"num_candidates": 1, "dropout": 0.0})
    output = model(**batch_of(PRESENT.repeat(3, 1)))
    output.logits.square().sum().backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # what stands for an unrecorded value in a table; here all are recorded
    assert [name for name in still if "missing_D" not in name] == []
    assert set(output.routing) == set(model.sparse_layers()) == {"fill.0"}
    assert {"fill_importance", "fill_load"} <= set(output.losses)


@pytest.mark.parametrize("fill", sorted(FILLS))
def test_a_saved_model_says_the_same(fill, tmp_path):
    model = model_of(fill)
    batch = batch_of(whole=True)
    model(**batch)  # in training: a mean moves
    before = model.eval()(**batch).logits
    model.save_pretrained(tmp_path)
    again = MultimodalMoEModel.from_pretrained(tmp_path).eval()
    assert torch.equal(again(**batch).logits, before)
    assert torch.equal(again(**batch).logits, before)


def test_the_warm_up_is_saved_with_the_weights(tmp_path):
    model = model_of(options={"warm_up_steps": 5})
    assert not model.eval()(**batch_of()).features["lab"][~PRESENT[:, 1]].any()
    model.fill.set_steps(5)
    model.save_pretrained(tmp_path)
    again = MultimodalMoEModel.from_pretrained(tmp_path).eval()
    assert again(**batch_of()).features["lab"][~PRESENT[:, 1]].any()


def test_a_fill_trains_when_towers_are_frozen_and_is_a_group_of_its_own():
    model = model_of()
    model.freeze(NAMES)
    report = dict(model.trainable_report())
    assert report["fill"] == sum(p.numel() for p in model.fill.parameters())
    assert report["gene tower"] == 0
    model(**batch_of()).logits.sum().backward()
    assert model.fill.attention.mix.weight.grad.any()


def test_features_of_any_backbone_are_one_token():
    config = MultimodalMoEConfig(
        backbone_config={"width": 16, "num_blocks": 1, "hidden": 24, "projection": 8},
        label_names=["x", "y"],
        fill="default",
    )
    model = build_model(config)
    present = torch.tensor([[True, False]])
    pixels = torch.randn(1, 3, 64, 64)
    output = model(present, {"image": {"pixel_values": pixels}})
    assert torch.equal(output.features["text"][0], model.fill.default.tokens_MPH[1, 0])


def test_features_of_different_widths_are_refused():
    config = MultimodalMoEConfig(
        backbone="small",
        backbone_config={
            "sequences": {"static": {"width": 5, "length": 1}},
            "arrays": {"image": {"shape": [8, 8]}},
        },
        modalities=["static", "image"],
        label_names=["x", "y"],
        fill="zero",
    )
    with pytest.raises(ConfigError, match=r"the widths static \d+, image \d+; take --backbone"):
        build_model(config)


@pytest.mark.parametrize(
    ("fill", "options", "words"),
    [
        ("retreiver", {}, r"unknown fill 'retreiver'; did you mean retriever"),
        ("retriever", {"num_candidate": 4}, r"unknown fill 'retriever': option 'num_candidate'; "),
        ("retriever", {"top_k": 40}, r"top_k \(40\) is more than the 12 experts"),
        (None, {"top_k": 4}, r"without a fill"),
        ("json:JSONDecoder", {}, r"no subclass of mm_moe.fill.base.Fill"),
    ],
)
def test_fills_and_options_that_do_not_exist_are_refused(fill, options, words):
    with pytest.raises(ConfigError, match=words):
        build_model(config_of(fill, options))


def test_a_generating_prompt_and_a_fill_are_one_too_many():
    config = MultimodalMoEConfig(
        backbone="sequences",
        backbone_config={
            "width": 16,
            "num_blocks": 1,
            "num_heads": 2,
            "hidden": 24,
            "projection": 8,
            "sequences": {n: {"width": 3, "length": 4} for n in ("text", "audio")},
        },
        modalities=["text", "audio"],
        label_names=["x", "y"],
        prompt="generative",
        fill="zero",
    )
    with pytest.raises(ConfigError, match=r"'generative' generates tokens.*fill 'zero'"):
        build_model(config)


def test_supports_that_do_not_fit_are_refused():
    model = model_of()
    batch = batch_of()
    without = {key: value for key, value in batch.items() if key != "supports"}
    with pytest.raises(DataError, match=r"brings no 'supports' for the 7 modalities"):
        model(**without)
    batch["supports"]["gene"]["present"] = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(DataError, match=r"supports of 'gene' hold \d rows, and 1 are described"):
        model(**batch)
    with pytest.raises(DataError, match=r"supports of 'x'; the model has the modalities gene"):
        model(**{**without, "supports": {"x": {}}})


def test_payloads_of_other_lengths_are_filled_up():
    one = {"values": torch.ones(1, 2, 3), "mask": torch.ones(1, 2, dtype=torch.bool)}
    two = {"values": torch.ones(2, 4, 3), "mask": torch.ones(2, 4, dtype=torch.bool)}
    both = joined("series", [one, two])
    assert both["values"].sum((1, 2)).tolist() == [6, 12, 12]
    assert both["mask"].sum(1).tolist() == [2, 4, 4]
    with pytest.raises(DataError, match="hold different things"):
        joined("series", [one, {"values": torch.ones(1, 2, 3)}])


def test_a_bank_with_its_routing_in_sparse_fusion_blocks():
    options = {"sparse": "all", "router": "flex", "num_experts": 7, "top_k": 2, "num_heads": 2}
    model = model_of("bank", fusion="transformer", fusion_options=options)
    output = model(**batch_of(PRESENT.repeat(2, 1)))
    assert {"general", "special", "balance"} <= set(output.losses)
    # every token of every cell is routed, as the fill made them real
    assert output.routing["fusion.0"].metrics["tokens"] == 14 * 3 * 2
    (output.logits.sum() + sum(output.losses.values())).backward()
    assert model.fill.bank_MRPH.grad.any()
