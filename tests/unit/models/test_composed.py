"""Products, mixtures and means of members: identities, absent modalities, folders, freezing."""

import pytest
import torch

from mm_moe.backbones.small import SmallBackbone
from mm_moe.errors import ConfigError
from mm_moe.models import ComposedConfig, ComposedModel, MultimodalMoEConfig
from mm_moe.models.combine import members_in_use, mixture_of_experts, product_of_experts
from mm_moe.models.folder import load_model
from mm_moe.models.processing import check_same_inputs, processors_for

torch.set_num_threads(1)
ARRAYS = {"image": {"shape": [4]}, "audio": {"shape": [3]}}
MODALITIES = ["image", "audio"]


def fields(*over, **more):
    config = MultimodalMoEConfig(
        backbone="small",
        backbone_config={"arrays": {name: ARRAYS[name] for name in over}, "num_blocks": 1},
        modalities=list(over),
        moe={"num_experts": 2},
        moe_mode="dense",
        **({"num_labels": 3} | more),
    )
    return config.to_dict()


def model_of(*names, **more) -> ComposedModel:
    torch.manual_seed(0)
    members = {name: fields(*name.split("+")) for name in names if name != "gate"}
    if "gate" in names:
        members["gate"] = fields(*MODALITIES, num_labels=len(members))
    config = ComposedConfig(modalities=MODALITIES, members=members, num_labels=3, **more)
    return ComposedModel(config).eval()


def batch_of(present=((True, True), (True, True), (True, True))):
    present_BM = torch.tensor(present, dtype=torch.bool).reshape(-1, 2)
    generator = torch.Generator().manual_seed(0)
    inputs = {}
    for m, name in enumerate(MODALITIES):
        values = torch.randn(len(present_BM), *ARRAYS[name]["shape"], generator=generator)
        if present_BM[:, m].any():
            inputs[name] = {"values": values[present_BM[:, m]]}
    return {"present": present_BM, "inputs": inputs}


ALL = ("image", "audio", "image+audio")


def test_the_sum_of_logits_is_the_normalised_product_of_probabilities():
    logits = torch.randn(5, 3, 4, dtype=torch.float64)
    use = torch.ones(5, 3, dtype=torch.bool)
    summed = logits.log_softmax(-1).sum(1)
    expected = summed - summed.logsumexp(-1, keepdim=True)
    found = product_of_experts(logits, use).log_softmax(-1)
    assert torch.allclose(found, expected, atol=1e-12)
    order = torch.tensor([2, 0, 1])
    assert torch.allclose(
        product_of_experts(logits[:, order], use), product_of_experts(logits, use)
    )


def test_who_speaks_for_a_sample():
    present = torch.tensor([[1, 1], [1, 0], [0, 1], [0, 0]]).bool()
    family = [[0], [1], [0, 1]]
    assert members_in_use(present, family).long().tolist() == [
        [1, 1, 1],
        [1, 0, 0],  # the joint member needs both
        [0, 1, 0],
        [0, 0, 1],  # nothing is there: the joint member's constants
    ]
    assert members_in_use(present, [[0, 1]]).all()  # alone, it speaks always
    pairs = torch.tensor([[1, 0, 0]]).bool()
    assert members_in_use(pairs, [[0, 1], [1, 2], [2]]).tolist() == [[True, False, False]]


def test_mixtures_by_hand():
    logits = torch.tensor([[[0.8, 0.2], [0.4, 0.6], [0.1, 0.9]]]).log()
    use = torch.tensor([[True, True, False]])
    mean = mixture_of_experts(logits, use, torch.zeros(1, 3), None)
    assert torch.allclose(mean.softmax(-1), torch.tensor([[0.6, 0.4]]))
    gate = torch.tensor([[0.75, 0.25, 5.0]]).log()
    mixed = mixture_of_experts(logits, use, gate, None).softmax(-1)
    assert torch.allclose(mixed, torch.tensor([[0.7, 0.3]]))
    yes = torch.tensor([[[0.8], [0.4], [0.1]]]).logit()
    labels = mixture_of_experts(yes, use, gate, "multi_label_classification").sigmoid()
    assert torch.allclose(labels, torch.tensor([[0.7]]))
    numbers = mixture_of_experts(torch.tensor([[[4.0], [8.0], [1.0]]]), use, gate, "regression")
    assert numbers.item() == pytest.approx(5.0)


def test_members_are_ordinary_models_and_an_inter_of_zeros_leaves_intra():
    model, batch = model_of(*ALL), batch_of()
    output = model(**batch)
    alone = {
        name: model.member(name)(
            present=torch.ones(3, len(name.split("+")), dtype=torch.bool),
            inputs={m: batch["inputs"][m] for m in name.split("+")},
        ).logits
        for name in ALL
    }
    assert torch.allclose(output.logits, sum(alone.values()), atol=1e-6)
    with torch.no_grad():
        model.member("image+audio").head.weight.zero_()
    intra = alone["image"] + alone["audio"]
    assert torch.allclose(model(**batch).logits, intra, atol=1e-6)
    assert list(output.routing) == [
        *("image:image.0", "audio:audio.0", "image+audio:image.0", "image+audio:audio.0")
    ]
    assert list(model.sparse_layers()) == list(output.routing)


@pytest.mark.parametrize("combine", ["product", "mean", "mixture"])
def test_a_batch_equals_its_samples_and_absent_modalities_drop_out(combine):
    model = model_of(*ALL, *(["gate"] if combine == "mixture" else []), combine=combine)
    rows = [[True, True], [False, True], [True, False], [False, False]]
    batch = batch_of(rows)
    together = model(**batch).logits
    places = {name: 0 for name in MODALITIES}
    for b, row in enumerate(rows):
        inputs = {}
        for m, name in enumerate(MODALITIES):
            if row[m]:
                at = places[name]
                inputs[name] = {"values": batch["inputs"][name]["values"][at : at + 1]}
                places[name] += 1
        own = model(torch.tensor([row]), inputs)
        assert torch.allclose(own.logits[0], together[b], atol=1e-6)
    audio = model.member("audio")(
        torch.ones(1, 1).bool(), {"audio": {"values": batch["inputs"]["audio"]["values"][1:2]}}
    )
    assert torch.allclose(together[1].softmax(-1), audio.logits[0].softmax(-1), atol=1e-6)


@pytest.mark.parametrize("rows", [[], [[True, False]], [[False, False]]])
def test_every_parameter_has_a_gradient_whatever_is_there(rows):
    model = model_of(*ALL, "gate", combine="mixture").train()
    output = model(**batch_of(rows))
    (output.logits.sum() + sum(output.losses.values())).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert len(output.routing) == 6


def test_a_folder_gives_the_same_model(tmp_path):
    model = model_of(*ALL, frozen=["audio"])
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path).eval()
    assert isinstance(again, ComposedModel)
    assert torch.equal(again(**batch_of()).logits, model(**batch_of()).logits)
    assert not any(p.requires_grad for p in again.member("audio").parameters())


def test_frozen_members_stay_as_they_are():
    counts = dict(model_of(*ALL, frozen=["image"]).trainable_report())
    assert counts["image:head"] == counts["image:image experts"] == 0
    assert counts["audio:head"] > 0
    model = model_of(*ALL, frozen=["image"]).train()
    assert not model.member("image").training
    assert model.member("audio").training


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"combine": "sum"}, "unknown combine 'sum'"),
        ({"combine": "mixture"}, "needs the member 'gate'"),
        ({"frozen": ["text"]}, "cannot freeze 'text'"),
        ({"num_labels": 4}, "has 3 outputs, it must have 4"),
        ({"modalities": ["image"]}, "member 'audio' is over audio"),
        ({"problem_type": "regression"}, "take mean or mixture"),
    ],
)
def test_settings_that_cannot_work_are_refused(more, match):
    members = {"image": fields("image"), "audio": fields("audio")}
    with pytest.raises(ConfigError, match=match):
        ComposedConfig(**({"modalities": MODALITIES, "members": members, "num_labels": 3} | more))


def test_members_that_want_other_inputs_are_named():
    other = fields("image")
    other["backbone_config"]["arrays"]["image"] = {"shape": [5]}
    SmallBackbone(other["backbone_config"], modalities=("image",))
    members = {"image": other, "image+audio": fields(*MODALITIES)}
    config = ComposedConfig(modalities=MODALITIES, members=members, num_labels=3)
    with pytest.raises(ConfigError, match=r"'image' and 'image\+audio' share the payload"):
        check_same_inputs(config)


def test_a_modality_that_no_member_reads_is_only_counted():
    model = model_of("audio")
    processors = processors_for(model.config)
    assert processors["image"]([b"whatever", b"else"])["rows"].shape == (2, 0)
    present = torch.tensor([[True, True], [True, False]])
    inputs = {"image": processors["image"]([1, 2]), "audio": {"values": torch.ones(1, 3)}}
    logits = model(present, inputs).logits
    alone = model.member("audio")(torch.ones(1, 1).bool(), {"audio": inputs["audio"]}).logits
    assert torch.allclose(logits[:1], alone)
