"""The retriever: what it pools, which experts it asks, and that supports have no order."""

import pytest
import torch

from mm_moe.errors import ConfigError
from mm_moe.fill.base import FillShape, SupportTokens
from mm_moe.fill.retriever import RetrieverFill, pool_weights
from mm_moe.fill.similar import SimilarRetrieverFill
from tests.fill_cases import NAMES, PRESENT, SHAPE, supports_of, tokens_of

torch.set_num_threads(1)
YES, NO = True, False


def test_pool_weights_sum_to_one_and_beta_is_the_samples_own():
    has = torch.tensor([[YES, YES, NO], [YES, YES, NO], [NO, NO, NO], [NO, NO, NO]])
    own = torch.tensor([[YES, NO], [NO, NO], [YES, YES], [NO, NO]])
    weight = pool_weights(has, own, beta=0.25)
    assert weight.tolist() == [
        [0.375, 0.375, 0, 0.25, 0],
        [0.5, 0.5, 0, 0, 0],
        [0, 0, 0, 0.5, 0.5],
        [0, 0, 0, 0, 0],
    ]


def test_legacy_is_the_weighted_mean_of_inputs():
    shape = FillShape(("a", "b"), 1, 2)
    fill = RetrieverFill(shape, legacy=True, num_heads=1, beta=0.5)
    tokens = {"a": torch.zeros(1, 1, 2), "b": torch.tensor([[[8.0, 0.0]]])}
    rows = torch.tensor([[[2.0, 2.0]], [[4.0, 6.0]], [[9.0, 9.0]]])
    there = torch.ones(3, 2, dtype=torch.bool)
    supports = {"a": SupportTokens(rows, torch.tensor([[0, 1, -1]]), there)}
    filled = fill(tokens, torch.tensor([[NO, YES]]), supports)
    # half of the mean (3, 4) of the two supports and half of (8, 0)
    assert filled.tokens["a"].tolist() == [[[5.5, 2.0]]]
    assert [name for name, _ in fill.named_parameters()] == ["default.tokens_MPH"]
    assert fill.sparse_layers() == {}
    assert filled.losses == {}


def test_what_is_pooled_are_the_experts_outputs():
    fill = RetrieverFill(SHAPE, dropout=0.0).eval()
    with torch.no_grad():  # experts that answer their bias alone, all the same
        for weight in (fill.layer.experts.w_in, fill.layer.experts.w_out):
            weight.zero_()
        fill.layer.experts.b_out.copy_(torch.arange(8.0).expand_as(fill.layer.experts.b_out))
    filled = fill(tokens_of(PRESENT), PRESENT, supports_of(PRESENT, empty=None))
    for m, name in enumerate(NAMES):
        missing = filled.tokens[name][~PRESENT[:, m]]
        assert torch.allclose(missing, torch.arange(8.0).expand_as(missing), atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"legacy": True}, {"segments": True, "residual": True}])
def test_the_order_of_supports_changes_nothing(options):
    fill = RetrieverFill(SHAPE, **options).eval()
    supports = supports_of(PRESENT)
    turned = {
        name: SupportTokens(s.tokens_SPH, s.rows_QN.flip(1), s.present_SM, s.index_S)
        for name, s in supports.items()
    }
    one, two = (fill(tokens_of(PRESENT), PRESENT, s).tokens for s in (supports, turned))
    for name in NAMES:
        assert torch.allclose(one[name], two[name], atol=1e-6, rtol=0)


def test_tokens_go_to_the_experts_of_what_they_stand_for():
    fill = RetrieverFill(SHAPE, num_candidates=2, num_candidates_shared=1, top_k=2)
    for m, name in enumerate(NAMES):
        present = torch.ones(4, 3, dtype=torch.bool)
        present[:, m] = False
        supports = {name: supports_of(present, empty=None)[name]}
        record = fill(tokens_of(present), present, supports).routing["fill.0"]
        own = set(record.tokens_E.nonzero().flatten().tolist())
        assert own <= {2 * m, 2 * m + 1, 6}
        # 4 cells of 3 supports (one has 2) and 2 own modalities, 2 tokens, 2 choices each
        assert record.tokens_E.sum() == (4 * 3 - 1 + 4 * 2) * 2 * 2


def test_an_empty_pool_gets_default_tokens_and_asks_no_expert():
    present = torch.tensor([[NO, YES, YES]])
    supports = {"a": supports_of(present)["a"]}
    supports["a"].rows_QN.fill_(-1)
    fill = RetrieverFill(SHAPE)
    filled = fill(tokens_of(present), present, supports)
    assert torch.equal(filled.tokens["a"][0], fill.default.tokens_MPH[0])
    assert filled.routing["fill.0"].tokens_E.sum() == 0


def test_a_sample_with_nothing_is_filled_from_its_supports():
    present = torch.zeros(2, 3, dtype=torch.bool)
    supports = supports_of(present, empty=("a", 0))
    filled = RetrieverFill(SHAPE, legacy=True)(tokens_of(present), present, supports)
    wanted = supports["b"].tokens_SPH[supports["b"].rows_QN[0]].mean(0)
    assert torch.allclose(filled.tokens["b"][0], wanted, atol=1e-6)
    assert all(x.isfinite().all() for x in filled.tokens.values())


def test_the_gate_loss_reaches_the_router():
    fill = RetrieverFill(SHAPE, gate_loss_coef=1.0, num_candidates=2, top_k=2)
    filled = fill(tokens_of(PRESENT), PRESENT, supports_of(PRESENT))
    assert set(filled.losses) == {"fill_importance", "fill_load", "fill_router_z"}
    sum(filled.losses.values()).backward()
    assert fill.layer.router.weight.grad.any()
    assert fill.layer.router.noise_weight.grad.any()


@pytest.mark.parametrize("option", ["around_default", "around_zero"])
def test_what_is_retrieved_is_scaled_and_added_to_default_tokens_or_none(option):
    plain = RetrieverFill(SHAPE, dropout=0.0).eval()
    around = RetrieverFill(SHAPE, dropout=0.0, **{option: True}).eval()
    around.load_state_dict(plain.state_dict(), strict=False)
    factor = torch.linspace(-1, 2, len(NAMES) * SHAPE.width).view(len(NAMES), SHAPE.width)
    assert around.gate is not None
    around.gate.data.copy_(factor)
    supports = supports_of(PRESENT, empty=None)
    found, base = (f(tokens_of(PRESENT), PRESENT, supports).tokens for f in (around, plain))
    for m, name in enumerate(NAMES):
        gone = ~PRESENT[:, m]
        expected = factor[m] * base[name][gone]
        if option == "around_default":
            expected = expected + plain.default.tokens_MPH[m]
        assert torch.allclose(found[name][gone], expected, atol=1e-6)
        assert torch.equal(found[name][~gone], base[name][~gone])


def test_similar_supports_weigh_more():
    shape = FillShape(("a", "b"), 1, 2)
    fill = SimilarRetrieverFill(shape, legacy=True, num_heads=1, beta=0.0, temperature=0.5)
    there, rows = torch.ones(2, 2, dtype=torch.bool), torch.arange(2)
    a, b = torch.tensor([[[4.0, 0.0]], [[0.0, 4.0]]]), torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    supports = {
        "a": SupportTokens(a, torch.tensor([[0, 1]]), there, rows),
        "b": SupportTokens(b, torch.empty(0, 2, dtype=torch.int64), there, rows),
    }
    tokens = {"a": torch.zeros(1, 1, 2), "b": torch.tensor([[[5.0, 0.0]]])}
    filled = fill(tokens, torch.tensor([[NO, YES]]), supports)
    # cosines 1 and 0, softmax of 2 and 0
    first = torch.tensor([2.0, 0.0]).softmax(0)
    assert torch.allclose(filled.tokens["a"][0, 0], 4 * first)
    for kind, value in ((SimilarRetrieverFill, 0), (RetrieverFill, 0.1)):
        with pytest.raises(ConfigError, match=r"is for fill 'similar_retriever', above 0"):
            kind(shape, num_heads=1, temperature=value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": 13}, r"top_k \(13\) is more than the 12 experts .* try top_k=12"),
        ({"num_candidates": 0}, r"num_candidates \(0\) must be a whole number from 1"),
        ({"num_heads": 3}, r"num_heads \(3\) must divide the tokens' width \(8\)"),
        ({"beta": 1.5}, r"beta \(1.5\) must be a number in 0 to 1"),
        ({"around_default": 1}, r"around_default \(1\) must be true or false"),
        ({"around_default": True, "legacy": True}, "keep one of the three"),
        ({"around_default": True, "around_zero": True}, "keep one of the three"),
        ({"num_draws": 0}, r"num_draws \(0\) must be a whole number from 1"),
        ({"legacy": "yes"}, r"legacy \('yes'\) must be true or false"),
        ({"gate_loss_coef": float("nan")}, r"gate_loss_coef \(nan\) must be a number from 0"),
    ],
)
def test_options_that_cannot_work_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        RetrieverFill(SHAPE, **options)
