"""Every registered router: routes each real row top_k times and learns from the task."""

import pytest
import torch

from mm_moe.moe.layer import MoELayer
from mm_moe.moe.settings import MoESettings
from mm_moe.registry import ROUTERS

# T tokens, D width, E experts
D, E = 8, 4


@pytest.fixture(params=[(name, k) for name in sorted(ROUTERS) for k in (1, 2)], ids=str)
def layer(request):
    name, top_k = request.param
    torch.manual_seed(0)
    return MoELayer(
        width=D, hidden=16, settings=MoESettings(num_experts=E, top_k=top_k, router=name)
    )


def test_every_row_is_routed_top_k_times(layer):
    output_TD, record = layer(torch.randn(20, D))
    assert output_TD.shape == (20, D)
    assert record.tokens_E.sum() == 20 * layer.settings.top_k


def test_the_router_learns_from_the_task_alone(layer):
    output_TD, _ = layer(torch.randn(20, D))
    output_TD.square().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())
    assert sum(p.grad.abs().sum() for p in layer.router.parameters()) > 0


def test_masked_rows_are_not_routed_and_change_nothing(layer):
    layer.eval()
    x_TD = torch.randn(6, D)
    mask_T = torch.tensor([True, True, False, True, False, False])
    output_TD, record = layer(x_TD, mask_T)
    alone_TD, alone = layer(x_TD[mask_T])
    assert torch.equal(output_TD[~mask_T], torch.zeros(3, D))
    torch.testing.assert_close(output_TD[mask_T], alone_TD)
    assert torch.equal(record.tokens_E, alone.tokens_E)


def test_no_row_at_all_still_gives_every_gradient(layer):
    output_TD, record = layer(torch.randn(4, D), torch.zeros(4, dtype=torch.bool))
    assert record.tokens_E.sum() == 0
    (output_TD.sum() + sum(record.losses.values())).backward()
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())
