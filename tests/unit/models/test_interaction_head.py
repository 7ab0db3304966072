"""The head of interaction experts: its mixture by hand, and as part of a model that publishes."""

import math

import pytest
import torch
from transformers import AutoModel

from mm_moe.errors import ConfigError
from mm_moe.models import MultimodalMoEConfig, build_model
from mm_moe.models.interaction_head import LAYER_NAME, mix
from mm_moe.models.interaction_settings import InteractionSettings

torch.set_num_threads(1)
SINGLE, MULTI, NUMBER = "single_label_classification", "multi_label_classification", "regression"
SEQUENCES = {name: {"width": 3, "length": 2} for name in ("left", "right")}
SHAPE = {"width": 8, "num_blocks": 1, "num_heads": 2, "hidden": 8, "projection": 6}


def model_of(*, labels=3, **options):
    torch.manual_seed(0)
    fields = {k: options.pop(k) for k in ("fusion", "fusion_size", "problem_type") if k in options}
    config = MultimodalMoEConfig(
        backbone="sequences",
        backbone_config={**SHAPE, "sequences": SEQUENCES},
        modalities=["left", "right"],
        **({"num_labels": 1} if labels == 1 else {"label_names": [*"abcdef"[:labels]]}),
        interaction_experts={"hidden": 5, "fuser_hidden": 4, **options},
        **fields,
    )
    return build_model(config).eval()


def batch_of(present):
    present_BM = torch.tensor(present, dtype=torch.bool).view(-1, 2)
    generator = torch.Generator().manual_seed(0)
    inputs = {}
    for m, name in enumerate(SEQUENCES):
        rows = int(present_BM[:, m].sum())
        if rows:
            values = torch.randn(rows, 2, 3, generator=generator)
            inputs[name] = {"values": values, "mask": torch.ones(rows, 2, dtype=torch.bool)}
    return {"present": present_BM, "inputs": inputs}


PRESENT = [[1, 1], [1, 0], [0, 1], [1, 1]]


def test_the_mixture_of_classes_by_hand():
    # experts (3/4, 1/4) and (1/2, 1/2), weights 1/4 and 3/4: .25 * .75 + .75 * .5 = .5625
    logits_BKC = torch.tensor([[[math.log(3.0), 0.0], [2.0, 2.0]]])
    weight_BK = torch.tensor([[0.25, 0.75]])
    mixed = mix(logits_BKC, weight_BK.log(), problem_type=SINGLE)
    assert mixed.exp()[0].tolist() == pytest.approx([0.5625, 0.4375])


def test_the_mixture_of_labels_and_of_numbers_by_hand():
    weight_BK = torch.tensor([[0.25, 0.75]])
    # probabilities 3/4 and 1/2 of one label: .5625
    logits_BK1 = torch.tensor([[[math.log(3.0)], [0.0]]])
    mixed = mix(logits_BK1, weight_BK.log(), problem_type=MULTI)
    assert mixed.sigmoid().item() == pytest.approx(0.5625)
    values_BK1 = torch.tensor([[[4.0], [-2.0]]])
    assert mix(values_BK1, weight_BK.log(), problem_type=NUMBER).item() == pytest.approx(-0.5)


@pytest.mark.parametrize("problem_type", [SINGLE, MULTI, NUMBER])
def test_equal_experts_give_what_one_gives_whatever_the_weights(problem_type):
    logits_BKC = torch.randn(5, 1, 3).expand(-1, 4, -1)
    log_weight_BK = torch.randn(5, 4).log_softmax(-1)
    mixed = mix(logits_BKC, log_weight_BK, problem_type=problem_type)
    alone = mix(logits_BKC[:, :1], torch.zeros(5, 1), problem_type=problem_type)
    assert torch.allclose(mixed, alone, atol=1e-6)


def test_the_logits_are_the_mixture_of_what_each_expert_says_in_one_dispatch():
    model, batch = model_of(), batch_of(PRESENT)
    output = model(**batch)
    said = output.interaction
    assert said.logits_BKC.shape == (4, 5, 3)  # R, U_left, U_right, AS, DS
    p_BC = (said.log_weight_BK.exp().unsqueeze(-1) * said.logits_BKC.softmax(-1)).sum(1)
    assert torch.allclose(output.logits.exp(), p_BC, atol=1e-6)
    # one layer, every expert once per sample
    assert output.routing[LAYER_NAME].tokens_E.tolist() == [4] * 5
    # expert 3 alone: its own feed-forward on the fused feature
    head, x_BD = model.head, torch.cat(model._parts(output.features), -1)
    experts = head.layer.experts
    hidden = torch.nn.functional.gelu(x_BD @ experts.w_in[3] + experts.b_in[3])
    y_BD = hidden @ experts.w_out[3] + experts.b_out[3]
    assert torch.allclose(said.logits_BKC[:, 3], head.classify(y_BD), atol=1e-6)


def test_hard_routing_computes_the_heaviest_kind_alone_and_only_outside_training():
    soft, hard = model_of(), model_of(hard=True)
    hard.load_state_dict(soft.state_dict())
    batch = batch_of(PRESENT)
    said = soft(**batch).interaction
    output = hard(**batch)
    best_B = said.log_weight_BK.argmax(-1)
    chosen_BC = said.logits_BKC[torch.arange(4), best_B].log_softmax(-1)
    assert torch.allclose(output.logits, chosen_BC, atol=1e-6)
    assert output.routing[LAYER_NAME].tokens_E.sum() == 4
    assert hard.train()(**batch).routing[LAYER_NAME].tokens_E.sum() == 20


def test_kinds_by_modalities_and_classes():
    fine, coarse = InteractionSettings(), InteractionSettings(kinds="coarse")
    two, three = ["a", "b"], ["a", "b", "c"]
    assert fine.names(two, num_labels=2) == ("R", "U_a", "U_b", "AS")
    assert fine.names(two, num_labels=3) == ("R", "U_a", "U_b", "AS", "DS")
    assert len(fine.names(three, num_labels=3)) == 2**3 + 1
    assert coarse.names(three, num_labels=2) == ("R", "U", "AS")
    with pytest.raises(ConfigError, match="two modalities"):
        fine.names(["a"], num_labels=2)


def test_what_explains_a_sample():
    # R: both were right, so redundancy or either uniqueness; U and AS: themselves
    fine = InteractionSettings().explains(4).int().tolist()
    assert fine == [[1, 1, 1, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    coarse = InteractionSettings(kinds="coarse").explains(4).int().tolist()
    assert coarse == [[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    three = InteractionSettings().explains(9)  # codes: R, a, b, ab, c, ac, bc, AS, DS
    assert three[3].nonzero().flatten().tolist() == [1, 2, 3]
    assert three[0].nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 5, 6]
    exact = InteractionSettings(fuser_target="exact").explains(5)
    assert torch.equal(exact, torch.eye(5, dtype=torch.bool))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"experts_per_kind": 2, "kinds": "coarse"},
        {"fusion": "low_rank", "fusion_size": 7},
        {"labels": 4, "problem_type": MULTI},
        {"labels": 1, "problem_type": NUMBER},
    ],
    ids=str,
)
def test_a_published_model_answers_alike_and_every_part_learns(options, tmp_path):
    model, batch = model_of(**options), batch_of([*PRESENT, [0, 0]])
    model.train()(**batch).logits[:4].square().sum().backward()
    lacking = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert lacking == []
    logits = model.eval()(**batch).logits
    assert logits.isfinite().all()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**batch).logits, logits)


def test_an_empty_batch_is_legal():
    output = model_of().train()(**batch_of([]))
    assert output.logits.shape == (0, 3)
    output.logits.sum().backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": "medium"}, "kinds.*fine, coarse"),
        ({"hidden": 0}, r"hidden \(0\)"),
        ({"fuser_coef": -1}, "fuser_coef"),
        ({"hard": 1}, "hard"),
        ({"fuser_targt": "exact"}, "fuser_target"),
    ],
)
def test_settings_that_cannot_work_say_so(options, message):
    with pytest.raises(ConfigError, match=message):
        InteractionSettings.from_dict(options)
    with pytest.raises(ConfigError, match="head_hidden_size"):
        MultimodalMoEConfig(interaction_experts={}, head_hidden_size=4)
