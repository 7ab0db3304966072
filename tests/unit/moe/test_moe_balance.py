"""Balance losses against numbers worked out by hand."""

import math

import pytest
import torch
from torch import tensor

from mm_moe.moe.balance import (
    RoutingSums,
    global_entropy,
    load_balance,
    load_balance_in_groups,
    local_entropy,
    router_z,
)


def sums_of(prob_TE, expert_TK, **options):
    return RoutingSums.of(logit_TE=prob_TE.log(), prob_TE=prob_TE, expert_TK=expert_TK, **options)


def test_load_balance_by_hand():
    prob_TE = tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    # first choices 0 1 0 2 -> share [.50 .25 .25]; mean prob [.400 .275 .325]; 3 * .35
    sums = sums_of(prob_TE, prob_TE.argmax(-1, keepdim=True))
    assert load_balance(sums).item() == pytest.approx(1.05)


def test_load_balance_of_two_choices_by_hand():
    prob_TE = tensor([[0.5, 0.3, 0.2], [0.4, 0.1, 0.5]])
    # choices 0 1 and 2 0 -> share [.50 .25 .25]; mean prob [.45 .20 .35]; 3 * .3625
    sums = sums_of(prob_TE, tensor([[0, 1], [2, 0]]))
    assert load_balance(sums).item() == pytest.approx(1.0875)


def test_load_balance_is_one_when_even_and_num_experts_when_all_go_to_one():
    even = sums_of(torch.full((4, 4), 0.25), torch.arange(4).unsqueeze(1))
    assert load_balance(even).item() == pytest.approx(1)
    prob_TE = torch.eye(4)[torch.zeros(6, dtype=torch.long)]
    one = sums_of(prob_TE + 1e-30, torch.zeros(6, 1, dtype=torch.long))
    assert load_balance(one).item() == pytest.approx(4)


def test_router_z_by_hand():
    # logits log 1, log 3 -> log-partition log 4; log 2, log 2 -> log 4
    logit_TE = tensor([[1.0, 3.0], [2.0, 2.0]]).log()
    sums = RoutingSums.of(
        logit_TE=logit_TE, prob_TE=logit_TE.softmax(-1), expert_TK=tensor([[1], [0]])
    )
    assert router_z(sums).item() == pytest.approx(math.log(4) ** 2)


def test_entropy_by_hand():
    sums = sums_of(tensor([[0.5, 0.5], [1.0, 0.0]]) + 0.0, tensor([[0], [0]]))
    assert (sums.entropy / sums.tokens).item() == pytest.approx(math.log(2) / 2)


def test_no_token_costs_nothing_and_stays_in_the_graph():
    logit_TE = torch.zeros(0, 3, requires_grad=True)
    sums = RoutingSums.of(
        logit_TE=logit_TE, prob_TE=logit_TE.softmax(-1), expert_TK=torch.zeros(0, 2).long()
    )
    loss = load_balance(sums) + router_z(sums)
    loss.backward()
    assert loss.item() == 0
    assert logit_TE.grad is not None


def test_losses_are_of_the_whole_batch_not_the_mean_of_the_ranks():
    prob_TE = torch.rand(10, 4, dtype=torch.float64).softmax(-1)
    expert_TK = prob_TE.topk(2).indices
    whole = sums_of(prob_TE, expert_TK)
    peer = []
    sums_of(prob_TE[3:], expert_TK[3:], sum_over_ranks=lambda totals: peer.append(totals) or totals)
    part = sums_of(prob_TE[:3], expert_TK[:3], sum_over_ranks=lambda totals: totals + peer[0])
    assert load_balance(part).item() == pytest.approx(load_balance(whole).item(), rel=1e-12)
    assert router_z(part).item() == pytest.approx(router_z(whole).item(), rel=1e-12)


def test_the_gradient_of_the_balance_loss_by_hand():
    # d loss / d mean prob_e = E * share_e, so each token's prob_e gets E * share_e / T
    prob_TE = tensor([[0.6, 0.4], [0.7, 0.3], [0.2, 0.8], [0.9, 0.1]], requires_grad=True)
    load_balance(sums_of(prob_TE, prob_TE.argmax(-1, keepdim=True))).backward()
    expected = tensor([2 * 0.75 / 4, 2 * 0.25 / 4]).expand(4, 2)
    torch.testing.assert_close(prob_TE.grad, expected)


@pytest.mark.parametrize("dropped", [0, 3])
def test_dropped_choices_are_counted(dropped):
    sums = sums_of(torch.full((4, 2), 0.5), torch.zeros(4, 1).long(), dropped=tensor(dropped))
    assert sums.dropped.item() == dropped
    assert sums.routed_E.tolist() == [4, 0]


def test_balance_inside_groups_by_hand():
    # experts 0 1 are one group, 2 3 the other; three tokens in the first, one in the second
    prob_TE = tensor(
        [[0.8, 0.2, 0.0, 0.0], [0.6, 0.4, 0.0, 0.0], [0.1, 0.9, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]
    )
    sums = sums_of(prob_TE + 1e-30, tensor([[0], [0], [1], [2]]))
    # first: shares 2/3 1/3, mean probabilities .5 .5 -> 2 * .5 = 1, for 3/4 of the tokens
    # second: shares 1 0, mean probabilities .5 .5 -> 2 * .5 = 1, for 1/4 of the tokens
    assert load_balance_in_groups(sums, 2).item() == pytest.approx(1)
    one = sums_of(prob_TE[:2, :2], tensor([[0], [0]]))
    assert load_balance_in_groups(one, 1).item() == pytest.approx(load_balance(one).item())
    assert load_balance_in_groups(one, 1).item() == pytest.approx(2 * 0.7)


def test_entropy_losses_by_hand():
    # entropies 0 and log 2; mean distribution (3/4, 1/4)
    sums = sums_of(tensor([[1.0, 0.0], [0.5, 0.5]]) + 1e-30, tensor([[0], [0]]))
    assert local_entropy(sums).item() == pytest.approx(math.log(2) / 2)
    mean = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert global_entropy(sums, math.log(2)).item() == pytest.approx(math.log(2) - mean, rel=1e-5)
    assert global_entropy(sums, 0.5).item() == 0  # the mean has 0.562 nats: enough


def test_entropy_losses_pull_tokens_apart_and_not_to_one_expert():
    logit_TE = tensor([[0.5, 0.0], [0.3, 0.0]], requires_grad=True)
    settings = {"entropy_gradient": True, "expert_TK": tensor([[0], [0]])}
    sums = RoutingSums.of(logit_TE=logit_TE, prob_TE=logit_TE.softmax(-1), **settings)
    (local,) = torch.autograd.grad(local_entropy(sums), logit_TE, retain_graph=True)
    (overall,) = torch.autograd.grad(global_entropy(sums, math.log(2)), logit_TE)
    assert (local[:, 0] < 0).all()  # descent makes each token surer
    assert (overall[:, 0] > 0).all()  # descent makes expert 0 less probable for all


def test_entropy_losses_stay_finite_where_probabilities_underflow():
    logit_TE = tensor([[200.0, 0.0]], requires_grad=True)
    sums = RoutingSums.of(
        logit_TE=logit_TE,
        prob_TE=logit_TE.softmax(-1),
        expert_TK=tensor([[0]]),
        entropy_gradient=True,
    )
    (local_entropy(sums) + global_entropy(sums, 0.7)).backward()
    assert logit_TE.grad.isfinite().all()


def test_entropy_losses_without_a_token_are_zero():
    prob_TE = torch.zeros(0, 3, requires_grad=True)
    sums = RoutingSums.of(
        logit_TE=prob_TE,
        prob_TE=prob_TE,
        expert_TK=torch.zeros(0, 1).long(),
        entropy_gradient=True,
    )
    loss = local_entropy(sums) + global_entropy(sums, 1.0)
    loss.backward()
    assert loss.item() == 0
