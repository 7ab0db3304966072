"""Every loss and variant against open_clip's own losses and the whole matrix of logits.

B samples, D joint width.
"""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mm_moe.errors import ConfigError
from pretrain.contrastive import LOSSES, VARIANTS, Contrastive, Siglip, contrastive_loss
from pretrain.pair_blocks import tiles

B, D = 7, 6


def leaves(rows: int = B, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Image and text features, logit scale and bias."""
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(rows, D, generator=generator, dtype=dtype) for _ in range(2)]
    numbers = [torch.tensor([math.log(10.0)], dtype=dtype), torch.tensor([-1.5], dtype=dtype)]
    return [leaf.requires_grad_() for leaf in (*features, *numbers)]


def with_gradients(loss: Tensor, at: list[Tensor]) -> list[Tensor]:
    return [
        loss.detach(),
        *torch.autograd.grad(loss, at, allow_unused=True, materialize_grads=True),
    ]


def ours(at: list[Tensor], flags: Tensor, **options) -> list[Tensor]:
    image, text, scale, bias = at
    loss = contrastive_loss(image, text, flags, scale, logit_bias=bias, **options)
    return with_gradients(loss, at)


def test_the_sigmoid_loss_by_hand():
    """Two orthogonal pairs, scale 2, bias -1: own logits 1, others -1."""
    eye = torch.eye(2)
    loss = contrastive_loss(
        eye,
        eye,
        torch.ones(2, dtype=torch.bool),
        torch.tensor(math.log(2.0)),
        logit_bias=torch.tensor(-1.0),
        loss="sigmoid",
    )
    # 4 questions of log(1 + exp(-1)), divided by 2 pairs
    assert loss.item() == pytest.approx(2 * math.log(1 + math.exp(-1)), abs=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_open_clip_has_the_same_value_and_gradients(loss, variant):
    library = pytest.importorskip("open_clip.loss")
    at = leaves(dtype=torch.float32)
    image, text, scale, bias = at
    peer = library.SigLipLoss() if loss == "sigmoid" else library.ClipLoss()
    features = [F.normalize(part, dim=-1) for part in (image, text)]
    theirs = with_gradients(peer(*features, scale.exp(), bias).sum(), at)
    flags = torch.ones(B, dtype=torch.bool)
    for mine, other in zip(
        ours(at, flags, loss=loss, variant=variant, chunk=3), theirs, strict=True
    ):
        assert torch.allclose(mine, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("flags", [[1] * B, [1, 0, 0, 1, 1, 0, 1], [0, 0, 1] + [0] * 4, [0] * B])
@pytest.mark.parametrize(("loss", "variant"), list(itertools.product(LOSSES, VARIANTS[1:])))
def test_tiles_of_any_size_equal_the_whole_matrix(loss, variant, flags):
    at, complete = leaves(), torch.tensor(flags, dtype=torch.bool)
    whole = ours(at, complete, loss=loss)
    for chunk in (1, 3, B, 100):
        parts = ours(at, complete, loss=loss, variant=variant, chunk=chunk)
        for mine, expected in zip(parts, whole, strict=True):
            assert torch.allclose(mine, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_the_whole_matrix_has_the_right_gradients(loss):
    flags = torch.tensor([1, 1, 0, 1], dtype=torch.bool)

    def value(image, text, scale, bias):
        return contrastive_loss(image, text, flags, scale, logit_bias=bias, loss=loss)

    assert torch.autograd.gradcheck(value, leaves(4))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_no_row_is_a_loss_of_zero(loss, variant):
    at = leaves(0)
    found = ours(at, torch.zeros(0, dtype=torch.bool), loss=loss, variant=variant)
    assert all(not part.any() for part in found)


def test_the_bias_does_not_move_the_softmax():
    at = leaves()
    flags = torch.ones(B, dtype=torch.bool)
    for variant in VARIANTS:
        assert ours(at, flags, variant=variant)[4].abs().max() < 1e-12


def test_tiles_cover_each_entry_once_and_find_every_partner():
    seen, own = torch.zeros(5, 11), torch.zeros(5, 11)
    for part in tiles(5, 11, tile=3, first=4):
        seen[part.rows, part.columns] += 1
        own[part.rows, part.columns][part.own].diagonal().add_(1)
    assert torch.equal(seen, torch.ones(5, 11))
    assert torch.equal(own, F.pad(torch.eye(5), (4, 2)))
    assert all(part.own == (slice(0, 0), slice(0, 0)) for part in tiles(5, 5, tile=3, first=None))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": "sigmoyd"}, "sigmoid"),
        ({"variant": "rings"}, "ring"),
        ({"chunk": 0}, "1024"),
        ({"chunk": True}, "whole number"),
        ({"chunk": "8"}, "whole number"),
    ],
)
def test_options_that_cannot_be_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        Contrastive(**options)


def test_what_a_new_model_starts_from():
    assert Contrastive().logit_start == (pytest.approx(math.log(1 / 0.07), abs=1e-3), None)
    assert Siglip().logit_start == (pytest.approx(math.log(10)), -10.0)
