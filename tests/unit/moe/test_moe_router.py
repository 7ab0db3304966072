"""The top-k softmax router."""

import pytest
import torch
from torch import tensor

from mm_moe.errors import ConfigError
from mm_moe.moe.router import TopKSoftmaxRouter, choose, renormalised
from mm_moe.moe.settings import MoESettings


def router_with(weight, top_k):
    router = TopKSoftmaxRouter(
        width=len(weight[0]), settings=MoESettings(num_experts=len(weight), top_k=top_k)
    )
    router.weight.data = tensor(weight)
    return router


def test_equal_scores_go_to_the_lower_expert():
    score_TE = tensor([[1.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert choose(score_TE, 3).tolist() == [[1, 2, 0], [0, 1, 2]]


def test_choices_and_weights_by_hand():
    router = router_with([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], top_k=2)
    routing = router(tensor([[2.0, 1.0]]).log())
    # logits log 2, log 1, 0 -> probabilities 1/2 1/4 1/4; the tie goes to expert 1
    torch.testing.assert_close(routing.prob_TE, tensor([[0.5, 0.25, 0.25]]))
    assert routing.expert_TK.tolist() == [[0, 1]]
    torch.testing.assert_close(routing.weight_TK, tensor([[2 / 3, 1 / 3]]))


@pytest.mark.parametrize("top_k", [1, 2])
def test_raw_probabilities_by_hand(top_k):
    settings = MoESettings(num_experts=3, top_k=top_k, renormalise=False)
    router = TopKSoftmaxRouter(width=2, settings=settings)
    router.weight.data = tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
    routing = router(tensor([[2.0, 1.0]]).log())
    torch.testing.assert_close(routing.weight_TK, tensor([[0.5, 0.25]])[:, :top_k])


def test_raw_probabilities_are_refused_for_other_routers():
    with pytest.raises(ConfigError, match=r"renormalise.*topk_softmax.*'topk_sigmoid'"):
        MoESettings(router="topk_sigmoid", renormalise=False)


def test_one_choice_has_weight_one_and_still_teaches_the_router():
    chosen_TK = tensor([[0.25], [0.5]], requires_grad=True)
    weight_TK = renormalised(chosen_TK)
    assert weight_TK.tolist() == [[1.0], [1.0]]
    weight_TK.sum().backward()
    assert chosen_TK.grad.tolist() == [[4.0], [2.0]]  # d log p / d p


def test_bf16_tokens_are_scored_in_float32():
    router = router_with([[1.0, 0.0], [0.0, 1.0]], top_k=1).to(torch.bfloat16)
    x_TD = tensor([[1.0, 2.0]], dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(x_TD)
    assert routing.logit_TE.dtype == routing.prob_TE.dtype == torch.float32


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_no_token_gives_an_empty_routing(top_k):
    router = TopKSoftmaxRouter(width=3, settings=MoESettings(num_experts=4, top_k=top_k))
    routing = router(torch.zeros(0, 3))
    assert routing.expert_TK.shape == routing.weight_TK.shape == (0, top_k)
