"""Learned noise, candidates of a modality, and the general and specialised losses."""

import pytest
import torch

from mm_moe.errors import ConfigError, DataError
from mm_moe.moe.balance import RoutingSums
from mm_moe.moe.context import TokenContext
from mm_moe.moe.router_candidates import CandidatesRouter
from mm_moe.moe.router_flex import FlexRouter
from mm_moe.moe.router_gate import chances_of
from mm_moe.moe.settings import MoESettings

torch.set_num_threads(1)


def candidates(num_experts=7, top_k=2, shared=1, **more):
    settings = MoESettings(
        num_experts=num_experts,
        top_k=top_k,
        router="noisy_candidates",
        num_modalities=3,
        num_shared_candidates=shared,
        **more,
    )
    torch.manual_seed(0)
    return CandidatesRouter(width=4, settings=settings)


def flex(num_experts=3, top_k=1):
    settings = MoESettings(
        num_experts=num_experts,
        top_k=top_k,
        router="flex",
        num_modalities=2,
        load_balance_coef=1.0,
        router_z_coef=0.0,
    )
    return FlexRouter(width=num_experts, settings=settings)


def losses_of(router, routing):
    sums = RoutingSums.of(
        logit_TE=routing.logit_TE, prob_TE=routing.prob_TE, expert_TK=routing.expert_TK
    )
    return router.losses(routing, sums, lambda totals: totals)


@pytest.mark.parametrize("scale", [0.0, 1.0, 100.0])
@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_a_forbidden_expert_is_never_chosen(top_k, scale):
    router = candidates(top_k=top_k)
    target = torch.arange(3).repeat(200)
    x = torch.randn(600, 4) * scale  # 0: all logits are tied
    routing = router(x, TokenContext(target=target), scale * torch.randn(600, 7))
    own = routing.expert_TK.div(2, rounding_mode="floor") == target[:, None]
    assert (own | (routing.expert_TK == 6)).all()
    assert torch.allclose(routing.weight_TK.sum(1), torch.ones(600))
    assert (routing.expert_TK.sort(1).values.diff(dim=1) > 0).all()
    assert router.candidates().tolist() == [[0, 1, 6], [2, 3, 6], [4, 5, 6]]
    loss = sum(losses_of(router, routing).values()) + routing.weight_TK.square().sum()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in router.parameters())


def test_candidates_are_those_of_the_calls_modality_where_rows_have_none():
    router = candidates()
    assert set(router(torch.randn(50, 4), TokenContext(2)).expert_TK.flatten().tolist()) <= {
        4,
        5,
        6,
    }
    with pytest.raises(DataError, match="was not told the modality"):
        router(torch.randn(2, 4))


def test_importance_is_balanced_among_the_candidates_of_each_modality():
    router = candidates(top_k=1, load_balance_coef=1.0, router_z_coef=0.0)
    with torch.no_grad():
        router.weight.zero_()
        router.weight[2, 0] = 5.0  # of modality 1
    x = torch.zeros(6, 4)
    x[:, 0] = 1.0
    # modality 0: ties, all three tokens to expert 0; modality 1: all to expert 2; modality 2: none
    routing = router(x, TokenContext(target=torch.tensor([0, 0, 0, 1, 1, 1])))
    assert routing.expert_TK.flatten().tolist() == [0, 0, 0, 2, 2, 2]
    # (3, 0, 0): mean 1, population variance 2, in both modalities that have tokens
    assert losses_of(router, routing)["importance"].item() == pytest.approx(2.0)


def test_the_chance_to_be_chosen_by_hand():
    router = candidates(num_experts=4, shared=1, top_k=1)
    with torch.no_grad():
        router.noise_weight.zero_()
        router.weight.zero_()
    noise = torch.tensor([[1.0, 0.0, 0.0, 2.0]])
    routing = router(torch.zeros(1, 4), TokenContext(target=torch.tensor([0])), noise)
    deviation = torch.log(torch.tensor(2.0)) + 0.01
    assert routing.expert_TK.tolist() == [[3]]
    # expert 0 must beat 2 deviations, expert 3 must beat 1; 1 and 2 are not modality 0's
    below = torch.special.ndtr(torch.tensor([-2.0, -1.0]))
    assert torch.allclose(routing.deviation_TE, deviation.expand(1, 4))
    assert torch.allclose(chances_of(routing)[0], torch.tensor([below[0], 0, 0, below[1]]))


def test_all_candidates_chosen_are_sure_to_be_chosen_again():
    router = candidates(top_k=3)
    routing = router(torch.randn(5, 4), TokenContext(1), torch.randn(5, 7))
    assert torch.equal(chances_of(routing), torch.tensor([[0, 0, 1, 1, 0, 0, 1.0]] * 5))


def test_special_tokens_are_pushed_to_the_expert_of_their_set():
    router = flex()
    with torch.no_grad():
        router.weight.copy_(torch.eye(3))
    # two modalities: pattern 3 is complete (expert 0), 2 has expert 1, 1 has expert 2
    patterns = torch.tensor([3, 2, 1, 0])
    x = torch.eye(3)[[0, 1, 0, 2]] * 4
    routing = router(x, TokenContext(combination=patterns))
    assert routing.group_T.tolist() == [0, 1, 2, 3]
    log_sum = torch.logsumexp(torch.tensor([4.0, 0, 0]), 0)
    losses = losses_of(router, routing)
    # token 1 is right (log_sum - 4), token 2 is wrong (log_sum - 0); token 3 has nothing
    assert losses["special"].item() == pytest.approx(((2 * log_sum - 4) / 2).item(), rel=1e-5)
    # one complete token at expert 0: (1, 0, 0) has variance 2 / 9 and mean 1 / 3
    assert losses["general"].item() == pytest.approx(2.0, rel=1e-5)
    # the others, over the experts 1 and 2: one token each
    assert losses["balance"].item() == pytest.approx(0.0, abs=1e-9)


def test_no_token_gives_no_loss_and_finite_gradients():
    for router, context in ((candidates(), TokenContext(0)), (flex(), None)):
        context = context or TokenContext(combination=torch.zeros(0, dtype=torch.int64))
        width = router.weight.shape[1]
        routing = router(torch.zeros(0, width), context, torch.zeros(0, len(router.weight)))
        losses = losses_of(router, routing)
        sum(losses.values()).backward()
        assert not any(loss.item() for loss in losses.values())
        assert all(not p.grad.any() for p in router.parameters())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_experts": 8, "num_shared_candidates": 1}, "try num_experts=7"),
        ({"num_experts": 7, "num_shared_candidates": 1, "top_k": 4}, "try top_k=3"),
        ({"num_experts": 6, "num_modalities": 0}, "set moe.num_modalities"),
    ],
)
def test_candidates_that_do_not_fit_are_refused(fields, words):
    fields = {"num_modalities": 3, **fields}
    with pytest.raises(ConfigError, match=words):
        CandidatesRouter(width=4, settings=MoESettings(router="noisy_candidates", **fields))


def test_flex_needs_an_expert_for_each_set():
    settings = MoESettings(router="flex", num_experts=6, num_modalities=3)
    with pytest.raises(ConfigError, match=r"the 7 sets of 3 modalities.*try num_experts=7"):
        FlexRouter(width=4, settings=settings)
