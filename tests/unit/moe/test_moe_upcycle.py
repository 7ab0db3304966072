"""An upcycled layer starts as the dense one, whatever library that came from."""

import pytest
import torch
from torch import nn

from mm_moe.errors import ConfigError
from mm_moe.moe.settings import MoESettings
from mm_moe.moe.upcycle import upcycle


def clip_mlp(activation):
    from transformers import CLIPVisionConfig
    from transformers.models.clip.modeling_clip import CLIPMLP

    return CLIPMLP(CLIPVisionConfig(hidden_size=24, intermediate_size=48, hidden_act=activation))


def open_clip_mlp(quick):
    from open_clip.transformer import QuickGELU, ResidualAttentionBlock

    return ResidualAttentionBlock(24, 4, act_layer=QuickGELU if quick else nn.GELU).mlp


def timm_mlp():
    from timm.layers import Mlp

    return Mlp(24, 48)


DENSE = {
    "clip quick_gelu": lambda: clip_mlp("quick_gelu"),
    "clip gelu": lambda: clip_mlp("gelu"),
    "clip gelu_tanh": lambda: clip_mlp("gelu_pytorch_tanh"),
    "open_clip gelu": lambda: open_clip_mlp(False),
    "open_clip quick": lambda: open_clip_mlp(True),
    "timm": timm_mlp,
    "no bias": lambda: nn.Sequential(
        nn.Linear(24, 48, bias=False), nn.GELU(), nn.Linear(48, 24, bias=False)
    ),
}


VARIANTS = {
    "sigmoid": {"router": "topk_sigmoid"},
    "noisy": {"router": "noisy_topk"},
    "residual": {"use_residual": True},
    "one shared": {"num_shared_experts": 1},
    "two shared": {"num_shared_experts": 2},
}


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["clip quick_gelu", "no bias"])
def test_every_variant_equals_the_dense_one(kind, variant, top_k):
    torch.manual_seed(0)
    mlp = DENSE[kind]()
    layer = upcycle(mlp, settings=MoESettings(top_k=top_k, **VARIANTS[variant]))
    x = torch.randn(5, 7, 24)
    y, _ = layer(x)
    assert (y - mlp(x)).abs().max() <= 1e-5


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("kind", DENSE)
def test_the_sparse_layer_equals_the_dense_one(kind, top_k):
    torch.manual_seed(0)
    mlp = DENSE[kind]()
    layer = upcycle(mlp, settings=MoESettings(num_experts=4, top_k=top_k))
    x = torch.randn(5, 7, 24)
    y, _ = layer(x)
    assert (y - mlp(x)).abs().max() <= 1e-5


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


def test_shapes_alone_are_enough_on_the_meta_device():
    with torch.device("meta"):
        layer = upcycle(clip_mlp("quick_gelu"), settings=MoESettings())
    assert layer.experts.w_in.is_meta
    assert layer.experts.activation == "quick_gelu"


class Reversed(nn.Module):
    """Declares its projections in the wrong order."""

    def __init__(self):
        super().__init__()
        self.down, self.act, self.up = nn.Linear(48, 24), nn.GELU(), nn.Linear(24, 48)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.Linear(4, 4), "two linear layers"),
        (nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 5)), "8 -> 5"),
        (nn.Sequential(nn.Linear(4, 8), nn.Mish(), nn.Linear(8, 4)), "Mish"),
        (
            nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Dropout(0.1), nn.Linear(8, 4)),
            "dropout only at 0",
        ),
        (
            nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 4)),
            "LayerNorm",
        ),
    ],
)
def test_what_cannot_be_upcycled_is_told(module, words):
    with pytest.raises(ConfigError, match=words):
        upcycle(module, settings=MoESettings())


def test_a_module_that_does_not_run_in_the_order_of_its_parts_is_refused():
    with pytest.raises(ConfigError, match="in the order"):
        upcycle(Reversed(), settings=MoESettings())
