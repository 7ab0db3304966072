"""What upcycling copies, and how noise and dropped units break the symmetry of the copies."""

import pytest
import torch

from mm_moe.moe.dense_parts import dense_parts
from mm_moe.moe.settings import MoESettings
from mm_moe.moe.upcycle import upcycle


def plain_mlp(width, hidden):
    from timm.layers import Mlp

    return Mlp(width, hidden)


def gated_mlp(width, hidden):
    from timm.layers import SwiGLU

    return SwiGLU(width, hidden)


def timm_mlp():
    return plain_mlp(24, 48)


def test_gradients_of_the_experts_add_up_to_the_dense_one():
    torch.manual_seed(0)
    mlp = timm_mlp().double()
    layer = upcycle(mlp, settings=MoESettings(num_experts=4, top_k=2))
    x = torch.randn(50, 24, dtype=torch.float64)
    mlp(x).square().sum().backward()
    layer(x)[0].square().sum().backward()
    total = layer.experts.w_in.grad.sum(0)
    torch.testing.assert_close(total, mlp.fc1.weight.grad.t(), rtol=1e-9, atol=1e-9)


def test_dtype_device_and_mode_are_kept_and_the_dense_module_is_left_alone():
    mlp = timm_mlp().to(torch.bfloat16).eval()
    before = mlp.fc1.weight.clone()
    layer = upcycle(mlp, settings=MoESettings(), noise=0.1)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}
    assert not layer.training
    assert torch.equal(mlp.fc1.weight, before)


def test_noise_breaks_the_symmetry_by_its_size_and_repeats_with_its_generator():
    mlp = timm_mlp()
    first, second = (
        upcycle(mlp, settings=MoESettings(), noise=0.1, generator=torch.Generator().manual_seed(3))
        for _ in range(2)
    )
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    change = first.experts.w_in - mlp.fc1.weight.t()
    assert change.std().item() == pytest.approx(0.1 * mlp.fc1.weight.std().item(), rel=0.05)
    assert not torch.equal(first.experts.w_in[0], first.experts.w_in[1])


def spread(tensor):
    return tensor.std(correction=0).item()


@pytest.mark.parametrize("gated", [False, True])
def test_dropped_units_are_drawn_anew_with_their_own_spread_and_the_others_kept(gated):
    torch.manual_seed(0)
    mlp = gated_mlp(40, 200) if gated else plain_mlp(40, 200)
    torch.nn.init.normal_(mlp.fc2.weight, mean=0.5, std=0.1)
    generator = torch.Generator().manual_seed(3)
    layer = upcycle(mlp, settings=MoESettings(), drop=0.35, generator=generator)
    parts, experts, chosen = dense_parts(mlp), layer.experts, []
    for e in range(4):
        changed_G = (experts.w_in[e] != parts.w_in).any(0)
        changed_F = (experts.w_out[e] != parts.w_out).any(1)
        assert changed_F.sum() == 70  # of 200 units
        assert torch.equal(changed_G, changed_F.repeat(2 if gated else 1))
        assert torch.equal(experts.b_out[e], parts.b_out)
        for new_FD, old_FD in (
            *zip(experts.w_in[e].t().split(200), parts.w_in.t().split(200), strict=True),
            (experts.w_out[e], parts.w_out),
        ):
            new, old = new_FD[changed_F], old_FD[changed_F]
            assert spread(new) == pytest.approx(spread(old), rel=0.07)
            assert new.mean().item() == pytest.approx(old.mean().item(), abs=0.1 * spread(old))
        chosen.append(tuple(changed_F.tolist()))
    assert len(set(chosen)) == 4  # every expert loses units of its own


def test_dropping_repeats_with_the_seed_and_leaves_what_works_beside_the_experts():
    mlp = plain_mlp(24, 48)
    layers = []
    for _ in range(2):
        torch.manual_seed(5)
        layers.append(upcycle(mlp, settings=MoESettings(num_shared_experts=1), drop=0.5))
    for a, b in zip(*(layer.parameters() for layer in layers), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(layers[0].companion.fc1.weight, mlp.fc1.weight)
    layer = upcycle(mlp, settings=MoESettings(), drop=0.02)  # less than one unit
    assert torch.equal(layer.experts.w_in[3], mlp.fc1.weight.t())


def test_the_biases_of_dropped_units_are_drawn_too():
    mlp = plain_mlp(4, 6)
    mlp.fc1.bias.data = torch.full((6,), 3.0)
    layer = upcycle(mlp, settings=MoESettings(num_experts=2), drop=1.0)
    assert torch.equal(layer.experts.b_in, torch.full((2, 6), 3.0))  # mean 3, no spread
    mlp.fc1.bias.data = torch.arange(6.0)
    layer = upcycle(mlp, settings=MoESettings(num_experts=2), drop=1.0)
    assert not torch.equal(layer.experts.b_in[0], mlp.fc1.bias)
