"""Expert choice, soft slots and hard routers, by hand."""

import math

import pytest
import torch
from torch import nn, tensor

from mm_moe.errors import ConfigError, DataError
from mm_moe.moe.context import TokenContext
from mm_moe.moe.layer import MoELayer
from mm_moe.moe.router_by_combination import ByCombinationRouter
from mm_moe.moe.router_by_interaction import ByInteractionRouter
from mm_moe.moe.router_by_modality import ByModalityRouter
from mm_moe.moe.router_expert_choice import ExpertChoiceRouter
from mm_moe.moe.router_soft import SoftSlotsRouter
from mm_moe.moe.settings import MoESettings


def alone(rows):
    return rows, 0


# --- expert choice


def expert_choice(**settings):
    router = ExpertChoiceRouter(
        width=2, settings=MoESettings(num_experts=2, router="expert_choice", **settings)
    )
    router.weight.data = tensor([[1.0, 0.0], [0.0, 1.0]])
    return router


# softmax of rows: (.75 .25) (.6 .4) (.25 .75) (.5 .5)
X_TD = tensor([[3.0, 1.0], [3.0, 2.0], [1.0, 3.0], [1.0, 1.0]]).log()


def test_experts_take_their_best_tokens():
    router = expert_choice(capacity_factor=1.5)  # 1.5 * 4 / 2 = 3 tokens each
    routing = router.agree(router(X_TD), alone)
    # expert 0 takes .75 .6 .5 (tokens 0 1 3), expert 1 takes .75 .5 .4 (tokens 2 3 1)
    assert routing.expert_TK.tolist() == [[0, 2], [0, 1], [1, 2], [0, 1]]  # 2: no choice
    torch.testing.assert_close(
        routing.weight_TK, tensor([[0.75, 0.0], [0.6, 0.4], [0.75, 0.0], [0.5, 0.5]])
    )
    assert routing.keep_TK.sum() == 6


def test_tokens_of_another_rank_compete():
    router = expert_choice(capacity_factor=1.0)  # 1 * 8 / 2 = 4 tokens each, of both ranks
    better = tensor([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.7, 0.3]])
    routing = router.agree(router(X_TD), lambda prob: (torch.cat([better, prob]), 4))
    # expert 0 takes three from there and our token 0; expert 1 our tokens 2 3 1 and the .3 there
    assert routing.expert_TK.tolist() == [[0], [1], [1], [1]]
    assert routing.keep_TK.tolist() == [[True], [True], [True], [True]]


def test_a_token_that_nobody_takes_gets_zero():
    settings = MoESettings(num_experts=2, router="expert_choice", capacity_factor=0.5)
    layer = MoELayer(width=2, hidden=3, settings=settings)
    layer.router.weight.data = tensor([[1.0, 0.0], [0.0, 1.0]])
    nn.init.normal_(layer.experts.b_out)
    y_TD, record = layer(X_TD)  # one token each: 0 and 2
    assert y_TD.abs().sum(-1).gt(0).tolist() == [True, False, True, False]
    assert record.tokens_E.tolist() == record.load_E.tolist() == [1, 1]
    assert record.metrics["dropped"] == 0


# --- soft slots


def soft(num_experts=2, slots=1):
    settings = MoESettings(
        num_experts=num_experts, router="soft_slots", slots_per_expert=slots, top_k=1
    )
    return SoftSlotsRouter(width=2, settings=settings)


def test_slots_by_hand():
    router = soft()
    router.weight.data = tensor([[5.0, 0.0], [0.0, 0.1]])  # keys become unit vectors
    router.scale.data = tensor([math.log(3)])
    x_TD = tensor([[2.0, 0.0], [0.0, 7.0], [1.0, 0.0]])  # a sequence of two tokens, one of one
    context = TokenContext().at(torch.Size([2, 2]), tensor([0, 1, 2]))
    mixing = router(x_TD, context).mixing
    # logits log 3 where token and key agree, else 0
    # sequence 0: slot 0 is 3/4 of token 0 and 1/4 of token 1, slot 1 the other way round
    # sequence 1: both slots are its only token
    expected = tensor([[1.5, 1.75], [0.5, 5.25], [1.0, 0.0], [1.0, 0.0]])
    torch.testing.assert_close(mixing.to_rows(x_TD), expected)
    y_RD = tensor([[4.0], [8.0], [0.0], [4.0]])
    # token 0: 3/4 * 4 + 1/4 * 8; token 1: 1/4 * 4 + 3/4 * 8; token 2: 3/4 * 0 + 1/4 * 4
    torch.testing.assert_close(mixing.to_tokens(y_RD), tensor([[5.0], [7.0], [1.0]]))


def test_slots_belong_to_their_experts():
    routing = soft(num_experts=2, slots=2)(
        torch.randn(3, 2), TokenContext().at(torch.Size([1, 3]), None)
    )
    assert routing.expert_TK.flatten().tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(routing.prob_TE.sum(-1), torch.ones(3))


def test_soft_slots_need_sequences():
    layer = MoELayer(width=2, hidden=3, settings=MoESettings(router="soft_slots"))
    with pytest.raises(ConfigError, match=r"needs input \(N, L, D\).*\(3, 2\).*topk_softmax"):
        layer(torch.randn(3, 2))


def test_soft_slots_gradients():
    settings = MoESettings(num_experts=2, router="soft_slots", slots_per_expert=2)
    layer = MoELayer(width=3, hidden=4, settings=settings).double()
    mask = tensor([[True, True, False], [False, False, False], [True, True, True]])
    names, values = zip(*layer.named_parameters(), strict=True)

    def run(x_NLD, *values):
        state = dict(zip(names, values, strict=True))
        return torch.func.functional_call(layer, state, (x_NLD, mask))[0]

    x_NLD = torch.randn(3, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x_NLD, *values))


# --- hard routers


def test_each_modality_goes_to_its_experts():
    settings = MoESettings(num_experts=2, router="by_modality", num_modalities=2)
    router = ByModalityRouter(width=1, settings=settings)
    assert list(router.parameters()) == []
    routing = router(torch.ones(2, 1), TokenContext(modality=1))
    assert routing.expert_TK.tolist() == [[1], [1]]
    assert routing.weight_TK.tolist() == [[1.0], [1.0]]


def test_a_gate_decides_inside_a_combination_by_hand():
    settings = MoESettings(num_experts=6, top_k=2, router="by_combination", num_modalities=2)
    router = ByCombinationRouter(width=1, settings=settings)
    # the best expert of all, 5, is not in the groups of these tokens
    router.weight.data = tensor([0.0, math.log(3), math.log(4), 0.0, 0.0, 9.0]).unsqueeze(1)
    routing = router(torch.ones(2, 1), TokenContext(combination=tensor([1, 2])))
    assert routing.expert_TK.tolist() == [[1, 0], [2, 3]]
    torch.testing.assert_close(routing.weight_TK, tensor([[0.75, 0.25], [0.8, 0.2]]))


def test_the_type_of_interaction_decides():
    settings = MoESettings(num_experts=4, router="by_interaction")
    router = ByInteractionRouter(width=1, settings=settings)
    tokens = TokenContext(interaction=tensor([3, 0])).at(torch.Size([2, 2]), None)
    assert router(torch.ones(4, 1), tokens).expert_TK.flatten().tolist() == [3, 3, 0, 0]
    with pytest.raises(DataError, match=r"4 interaction types.*groups 4 to 4"):
        router(torch.ones(1, 1), TokenContext(interaction=tensor([4])))
    with pytest.raises(DataError, match='key "interaction"'):
        router(torch.ones(1, 1), TokenContext(modality=0))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"router": "by_modality"}, "number of modalities"),
        ({"router": "by_interaction", "num_experts": 6}, r"\(6\).* 4 interaction.*num_experts=8"),
        (
            {"router": "by_combination", "num_modalities": 2, "num_experts": 6, "top_k": 3},
            r"top_k \(3\) is more than the 2 .*try top_k=2 or num_experts=9",
        ),
        ({"router": "soft_slots", "drop_tokens": True}, "set drop_tokens=False"),
        ({"router": "expert_choice", "drop_tokens": True}, "set drop_tokens=False"),
        ({"router": "noisy_topk", "bias_update_rate": 0.1}, r"\(0.1\) does not work"),
    ],
)
def test_settings_that_a_router_cannot_honour(settings, words):
    with pytest.raises(ConfigError, match=words):
        MoELayer(width=2, hidden=2, settings=MoESettings(**settings))
