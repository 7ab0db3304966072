"""Every registered router: real tokens only, a router that learns, empty calls, float32 scores."""

import pytest
import torch
from torch import nn

from mm_moe.moe.context import TokenContext
from mm_moe.moe.layer import MoELayer
from mm_moe.moe.settings import MoESettings
from mm_moe.moe.upcycle import upcycle
from mm_moe.registry import ROUTERS

# N rows, L tokens of a row, D width, E experts; E is a multiple of 2 modalities, 3 combinations of
# them and 4 types of interaction
N, L, D, E = 4, 5, 8, 12
CONTEXT = TokenContext(0, torch.tensor([1, 3, 2, 3]), torch.tensor([0, 1, 2, 3]))
CASES = [(name, k) for name in sorted(ROUTERS) for k in (1, 2)]


def settings_of(name, top_k, **more):
    return MoESettings(num_experts=E, top_k=top_k, router=name, num_modalities=2, **more)


@pytest.fixture(params=CASES, ids=str)
def layer(request):
    torch.manual_seed(0)
    return MoELayer(width=D, hidden=16, settings=settings_of(*request.param))


def rows_wanted(layer, tokens, sequences):
    """Rows that the experts compute: tokens times top_k, unless the router counts otherwise."""
    settings = layer.settings
    if settings.router == "soft_slots":
        return sequences * E * settings.slots_per_expert
    if settings.router == "expert_choice":
        return E * -(-tokens * settings.top_k * 5 // (E * 4))  # capacity_factor 5 / 4, rounded up
    return tokens * settings.top_k


def test_every_real_token_is_routed_as_often_as_it_should(layer):
    output_NLD, record = layer(torch.randn(N, L, D), None, CONTEXT)
    assert output_NLD.shape == (N, L, D)
    assert record.tokens_E.sum() == rows_wanted(layer, N * L, N)
    assert torch.equal(record.load_E, record.tokens_E)
    assert record.metrics["tokens"] == N * L
    assert record.metrics["dropped"] == 0


def test_the_router_learns_from_the_task_alone(layer):
    output_NLD, _ = layer(torch.randn(N, L, D), None, CONTEXT)
    output_NLD.square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    learnt = sum(p.grad.abs().sum() for p in layer.router.parameters())
    assert learnt > 0 or not list(layer.router.parameters())


def test_padding_is_not_routed_and_changes_nothing(layer):
    layer.eval()
    x_NLD = torch.randn(N, L, D)
    mask_NL = torch.arange(L) < torch.tensor([2, 5, 0, 1]).unsqueeze(1)
    output_NLD, record = layer(x_NLD, mask_NL, CONTEXT)
    noise_NLD = 7 * torch.randn(N, L, D) * ~mask_NL.unsqueeze(-1)
    other_NLD, _ = layer(x_NLD + noise_NLD, mask_NL, CONTEXT)
    assert record.tokens_E.sum() == rows_wanted(layer, 8, 3)
    assert record.metrics["tokens"] == 8
    assert not output_NLD[~mask_NL].any()
    assert torch.equal(output_NLD, other_NLD)


def test_no_token_at_all_still_gives_every_gradient(layer):
    x_NLD, no_token = torch.randn(1, L, D), torch.zeros(1, L, dtype=torch.bool)
    context = TokenContext(0, torch.tensor([3]), torch.tensor([0]))
    output_NLD, record = layer(x_NLD, no_token, context)
    assert record.tokens_E.sum() == 0
    (output_NLD.sum() + sum(record.losses.values())).backward()
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("autocast", [True, False])
def test_the_router_works_in_float32_under_bf16(layer, autocast):
    routings = []
    layer.router.register_forward_hook(lambda *call: routings.append(call[-1]))
    x_NLD = torch.randn(N, L, D)
    if not autocast:
        layer.to(torch.bfloat16)
        x_NLD = x_NLD.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output_NLD, record = layer(x_NLD, None, CONTEXT)
    (output_NLD.float().sum() + sum(record.losses.values())).backward()
    assert output_NLD.dtype == torch.bfloat16
    for tensor in (routings[0].logit_TE, routings[0].prob_TE, routings[0].weight_TK):
        assert tensor.dtype == torch.float32
    assert all(loss.dtype == torch.float32 for loss in record.losses.values())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "top_k"), CASES)
def test_an_upcycled_layer_is_the_dense_one_exactly_if_the_router_says_so(name, top_k, training):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(D, 16), nn.GELU(), nn.Linear(16, D))
    sparse = upcycle(dense, settings=settings_of(name, top_k)).train(training)
    nn.init.normal_(sparse.router.weight) if list(sparse.router.parameters()) else None
    x_NLD = torch.randn(N, L, D)
    gap = (sparse(x_NLD, None, CONTEXT)[0] - dense(x_NLD)).abs().max().item()
    assert gap <= 1e-5 if ROUTERS.resolve(name).keeps_dense_function else gap > 1e-2


@pytest.mark.parametrize(("name", "top_k"), CASES)
def test_a_sequence_depends_on_others_only_if_the_router_says_so(name, top_k):
    torch.manual_seed(0)
    layer = MoELayer(width=D, hidden=16, settings=settings_of(name, top_k)).eval()
    x_NLD = torch.randn(N, L, D)
    other_NLD = torch.cat([x_NLD[:1], 5 * torch.randn(N - 1, L, D)])
    gap = layer(x_NLD, None, CONTEXT)[0][0] - layer(other_NLD, None, CONTEXT)[0][0]
    assert (gap.abs().max().item() > 1e-5) == ROUTERS.resolve(name).couples_samples
