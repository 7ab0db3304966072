"""CLIP's loss against the textbook form, and what a missing modality does to it.

B samples, D joint width.
"""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mm_moe.batch import Batch
from pretrain.contrastive import Contrastive, contrastive_loss

SCALE = torch.tensor(math.log(10.0))


def textbook(image_BD: Tensor, text_BD: Tensor, scale: float) -> Tensor:
    """The pseudocode of the CLIP paper, on complete pairs."""
    image_BD = image_BD / image_BD.norm(dim=1, keepdim=True)
    text_BD = text_BD / text_BD.norm(dim=1, keepdim=True)
    logits_BB = image_BD @ text_BD.T * scale
    label_B = torch.arange(len(logits_BB))
    return (F.cross_entropy(logits_BB, label_B) + F.cross_entropy(logits_BB.T, label_B)) / 2


def features(rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(rows, 6, generator=generator).requires_grad_() for _ in range(2))  # type: ignore[return-value]


def complete(*flags: int) -> Tensor:
    return torch.tensor(flags, dtype=torch.bool)


def test_two_pairs_by_hand():
    """Orthogonal pairs: each row sees its own at 1 and the other at 0."""
    eye = torch.eye(2)
    loss = contrastive_loss(3 * eye, 5 * eye, complete(1, 1), torch.tensor(math.log(2.0)))
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-2.0)), abs=1e-6)


def test_the_textbook_loss_and_gradients():
    image, text = features(5)
    scale = SCALE.clone().requires_grad_()
    ours = contrastive_loss(image, text, complete(1, 1, 1, 1, 1), scale)
    expected = textbook(image, text, scale.exp())
    assert ours.item() == pytest.approx(expected.item(), abs=1e-6)
    leaves = (image, text, scale)
    for mine, theirs in zip(
        torch.autograd.grad(ours, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        assert torch.allclose(mine, theirs, atol=1e-6)


def test_open_clip_agrees():
    open_clip = pytest.importorskip("open_clip")
    image, text = (F.normalize(part, dim=1) for part in features(5))
    ours = contrastive_loss(image, text, complete(1, 1, 1, 1, 1), SCALE)
    theirs = open_clip.ClipLoss()(image, text, SCALE.exp())
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)


def test_a_row_that_lacks_something_is_neither_positive_nor_negative():
    image, text = features(5)
    flags = complete(1, 0, 1, 0, 1)
    ours = contrastive_loss(image, text, flags, SCALE)
    expected = textbook(image[flags], text[flags], 10.0)
    assert ours.item() == pytest.approx(expected.item(), abs=1e-6)
    grads = torch.autograd.grad(ours, (image, text))
    references = torch.autograd.grad(expected, (image, text))
    for mine, theirs in zip(grads, references, strict=True):
        assert not mine[~flags].any()
        assert torch.allclose(mine, theirs, atol=1e-6)


def test_absent_features_are_zero_rows_and_harmless():
    image, text = (part.detach().clone() for part in features(3))
    text[1] = 0.0  # what the model gives where the text is absent
    text.requires_grad_()
    loss = contrastive_loss(image, text, complete(1, 0, 1), SCALE)
    loss.backward()
    assert torch.isfinite(text.grad).all()
    assert loss.item() == pytest.approx(textbook(image[::2], text[::2], 10.0).item(), abs=1e-6)


@pytest.mark.parametrize("rows", [3, 0])
def test_no_pair_at_all_is_zero_and_connected(rows):
    image, text = features(rows)
    scale = SCALE.clone().requires_grad_()
    loss = contrastive_loss(image, text, complete(*[0] * rows), scale)
    assert loss.item() == 0.0
    loss.backward()
    for leaf in (image, text, scale):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_the_temperature_cannot_run_away():
    image, text = features(4)
    flags = complete(1, 1, 1, 1)
    hot = contrastive_loss(image, text, flags, torch.tensor(20.0))
    assert hot.item() == pytest.approx(textbook(image, text, 100.0).item(), rel=1e-5)


def test_the_objective_takes_complete_rows_and_the_scale_of_the_inner_model():
    image, text = features(3)
    output = SimpleNamespace(
        features={"image": image, "text": text}, losses={"router_z": torch.tensor(0.5)}
    )
    present = torch.tensor([[1, 1], [1, 0], [1, 1]], dtype=torch.bool)
    batch = Batch.of(["a", "b", "c"], present, {})

    class Engine:
        module = torch.nn.ParameterDict({"logit_scale": SCALE.view(1)})

        def __call__(self, **_):
            return output

    loss, parts, returned = Contrastive()(Engine(), batch)
    expected = textbook(image[::2], text[::2], 10.0).item()
    assert parts["contrastive"].item() == pytest.approx(expected, abs=1e-6)
    assert loss.item() == pytest.approx(expected + 0.5, abs=1e-6)
    assert loss.shape == ()
    assert returned is output
