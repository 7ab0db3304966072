"""Feed-forwards of every library become experts of the same function, and the rest is refused."""

import pytest
import torch
from torch import nn

from mm_moe.errors import ConfigError
from mm_moe.moe.dense_parts import dense_parts
from mm_moe.moe.settings import MoESettings
from mm_moe.moe.upcycle import upcycle

D, F = 24, 40


def transformers_mlp(model, mlp, config, **fields):
    """A feed-forward class of `transformers` at a small size."""
    import importlib

    configs = importlib.import_module("transformers")
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    return getattr(module, mlp)(getattr(configs, config)(**fields))


def clip(activation, model="clip", mlp="CLIPMLP", config="CLIPVisionConfig"):
    sizes = {"hidden_size": D, "intermediate_size": F}
    return transformers_mlp(model, mlp, config, **sizes, hidden_act=activation)


def t5(kind, mlp):
    fields = {"d_model": D, "d_ff": F, "dropout_rate": 0.0, "feed_forward_proj": kind}
    return transformers_mlp("t5", mlp, "T5Config", **fields)


def opt_layer(activation="relu"):
    sizes = {"hidden_size": D, "ffn_dim": F, "num_attention_heads": 2, "dropout": 0.0}
    fields = {**sizes, "activation_function": activation}
    return transformers_mlp("opt", "OPTDecoderLayer", "OPTConfig", **fields)


def opt(activation):
    layer = opt_layer(activation)
    return nn.Sequential(layer.fc1, layer.activation_fn, layer.fc2)


def open_clip(layer):
    from open_clip.transformer import ResidualAttentionBlock

    return ResidualAttentionBlock(D, 4, act_layer=layer).mlp


def open_clip_quick():
    from open_clip.transformer import QuickGELU

    return open_clip(QuickGELU)


def timm(name, *args, **fields):
    import timm.layers

    return getattr(timm.layers, name)(D, *args, **fields)


def llama(model, mlp, config, **fields):
    sizes = {"hidden_size": D, "intermediate_size": F, "num_attention_heads": 2}
    return transformers_mlp(model, mlp, config, **sizes, **fields)


DENSE = {  # name -> the module, the activation that its experts must have
    "clip quick": (lambda: clip("quick_gelu"), "quick_gelu"),
    "clip gelu": (lambda: clip("gelu"), "gelu"),
    "siglip": (
        lambda: clip("gelu_pytorch_tanh", "siglip", "SiglipMLP", "SiglipVisionConfig"),
        "gelu_tanh",
    ),
    "blip2": (lambda: clip("gelu", "blip_2", "Blip2MLP", "Blip2VisionConfig"), "gelu"),
    "opt relu": (lambda: opt("relu"), "relu"),
    "opt gelu": (lambda: opt("gelu"), "gelu"),
    "t5": (lambda: t5("relu", "T5DenseActDense"), "relu"),
    "t5 gated": (lambda: t5("gated-gelu", "T5DenseGatedActDense"), "gelu_tanh_gated"),
    "t5 gated silu": (lambda: t5("gated-silu", "T5DenseGatedActDense"), "silu_gated"),
    "llama": (lambda: llama("llama", "LlamaMLP", "LlamaConfig"), "silu_gated"),
    "llama bias": (lambda: llama("llama", "LlamaMLP", "LlamaConfig", mlp_bias=True), "silu_gated"),
    "mistral": (lambda: llama("mistral", "MistralMLP", "MistralConfig"), "silu_gated"),
    "open_clip gelu": (lambda: open_clip(nn.GELU), "gelu"),
    "open_clip quick": (open_clip_quick, "quick_gelu"),
    "timm": (lambda: timm("Mlp", F), "gelu"),
    "timm half bias": (lambda: timm("Mlp", F, bias=(True, False), act_layer=nn.SiLU), "silu"),
    "timm in place": (lambda: timm("Mlp", F, act_layer=lambda: nn.ReLU(inplace=True)), "relu"),
    "timm gated mlp": (lambda: timm("GatedMlp", F), "gelu"),
    "timm swiglu": (lambda: timm("SwiGLU", F), "silu_gated"),
    "timm packed": (lambda: timm("SwiGLUPacked", 2 * F), "silu_gated"),
    "timm glu": (lambda: timm("GluMlp", 2 * F), "sigmoid_gated"),
    "timm geglu": (lambda: timm("GluMlp", 2 * F, act_layer=nn.GELU, bias=False), "gelu_gated"),
    "square": (lambda: timm("SwiGLU", D), "silu_gated"),
    "square packed": (lambda: timm("GluMlp", 2 * D, act_layer=nn.GELU), "gelu_gated"),
    "as wide as half": (lambda: timm("Mlp", D // 2), "gelu"),
}
MIXED = ("clip quick", "t5", "t5 gated", "timm glu")  # with and without gate and bias
VARIANTS = {
    "sigmoid": {"router": "topk_sigmoid"},
    "noisy": {"router": "noisy_topk"},
    "residual": {"use_residual": True},
    "one shared": {"num_shared_experts": 1},
    "two shared": {"num_shared_experts": 2},
}


def made(kind):
    """The module of a library with weights large enough to tell functions apart."""
    torch.manual_seed(0)
    mlp = DENSE[kind][0]()
    for parameter in mlp.parameters():
        nn.init.normal_(parameter, std=0.3)
    return mlp


def distance(kind, **settings):
    """Largest difference at initialisation between a module and the sparse layer made of it."""
    mlp = made(kind)
    layer = upcycle(mlp, settings=MoESettings(num_experts=4, **settings))
    assert layer.experts.activation == DENSE[kind][1]
    x = torch.randn(5, 7, D)
    dense = mlp(x)
    assert dense.std() > 0.1  # else closeness would mean nothing
    return (layer(x)[0] - dense).abs().max().item()


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("kind", DENSE)
def test_the_sparse_layer_equals_the_dense_one(kind, top_k):
    assert distance(kind, top_k=top_k) <= 1e-5


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", MIXED)
def test_every_variant_equals_the_dense_one(kind, variant, top_k):
    assert distance(kind, top_k=top_k, **VARIANTS[variant]) <= 1e-5


@pytest.mark.parametrize("kind", DENSE)
def test_shapes_alone_are_enough_on_the_meta_device(kind):
    with torch.device("meta"):
        layer = upcycle(DENSE[kind][0](), settings=MoESettings())
    assert layer.experts.w_in.is_meta
    assert layer.experts.activation == DENSE[kind][1]


def test_gate_and_value_are_found_whatever_the_weights_say():
    for last in (False, True):
        mlp = timm("GluMlp", 2 * F, act_layer=nn.SiLU, gate_last=last)
        nn.init.zeros_(mlp.fc2.weight)  # every reading gives the same output
        gate, value = mlp.fc1.weight.chunk(2)[:: -1 if last else 1]
        parts = dense_parts(mlp)
        assert torch.equal(parts.w_in, torch.cat([gate, value]).t())
        assert torch.equal(parts.b_in.roll(F if last else 0), mlp.fc1.bias)


def test_looking_draws_no_random_numbers_and_changes_nothing():
    mlp = timm("SwiGLU", F).train()
    before = {name: value.clone() for name, value in mlp.state_dict().items()}
    state = torch.get_rng_state()
    dense_parts(mlp)
    assert torch.equal(torch.get_rng_state(), state)
    assert mlp.training
    assert all(torch.equal(value, before[name]) for name, value in mlp.state_dict().items())


class Odd(nn.Module):
    """Two layers, an activation, and something that its parts do not show."""

    def __init__(self, after):
        super().__init__()
        self.down, self.act, self.up = nn.Linear(48, 24), nn.GELU(), nn.Linear(24, 48)
        self.after = after

    def forward(self, x):
        return self.after(x, self.down(self.act(self.up(x))))


class Scaled(nn.Sequential):
    """A feed-forward with a learnt scale."""

    def __init__(self, *parts):
        super().__init__(*parts)
        self.gamma = nn.Parameter(torch.ones(1))


class Quantised(nn.Linear):
    """A linear layer that is more than its weight."""

    def forward(self, x):
        return super().forward(x).round()


def test_the_order_of_declaration_does_not_matter():
    mlp = Odd(lambda x, y: y)
    parts = dense_parts(mlp)
    assert torch.equal(parts.w_in, mlp.up.weight.t())
    assert torch.equal(parts.w_out, mlp.down.weight.t())


def chain(*between, out=4):
    return nn.Sequential(nn.Linear(4, 8), *between, nn.Linear(8, out))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nn.Linear(4, 4), "two linear layers .* found: Linear"),
        (lambda: chain(nn.GELU(), out=5), "4 -> 8 and 8 -> 5"),
        (lambda: chain(nn.Mish()), "Mish; known activations: gelu"),
        (lambda: chain(nn.ReLU6()), "ReLU6"),
        (lambda: chain(nn.GELU(), nn.Dropout(0.1)), "Dropout at 0.1.*only at 0"),
        (lambda: chain(nn.GELU(), nn.LayerNorm(8)), "found: Linear, GELU, LayerNorm, Linear"),
        (lambda: chain(nn.PReLU()), "parameter '1.weight'"),
        (lambda: Scaled(*chain(nn.GELU())), "parameter 'gamma'"),
        (lambda: nn.Sequential(Quantised(4, 8), nn.GELU(), nn.Linear(8, 4)), "Quantised, GELU"),
        (lambda: timm("SwiGLU", F, norm_layer=nn.LayerNorm), "SiLU, LayerNorm, Linear"),
        (lambda: timm("GlobalResponseNormMlp", F), "GlobalResponseNorm"),
        (lambda: timm("ConvMlp", F), "found: Conv2d, ReLU, Conv2d"),
        (lambda: timm("Mlp", F, use_conv=True), "found: Conv2d, GELU, Conv2d"),
        (opt_layer, "OPTDecoderLayer.*LayerNorm"),
        (lambda: Odd(lambda x, y: x + y), "does more than linear, activation"),
        (lambda: Odd(lambda x, y: (y, x)), "does more than linear, activation"),
        (lambda: Odd(lambda x, y: y.view(-1, 48, 2)), "a trial run failed"),
    ],
)
def test_what_cannot_be_upcycled_is_told(make, words):
    with pytest.raises(ConfigError, match=words) as told:
        upcycle(make(), settings=MoESettings())
    assert str(told.value).endswith("Leave this layer out of moe_layers.")
