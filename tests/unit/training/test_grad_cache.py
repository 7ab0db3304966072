"""GradCache against the loss over all micro-batches at once, with dropout and moving buffers.

B samples of a micro-batch, D joint width.
"""

import math

import pytest
import torch
from torch import nn

from mm_moe.batch import IMAGE, TEXT, Batch
from mm_moe.models.output import MultimodalMoEOutput
from mm_moe.training.grad_cache import GradCache
from pretrain.contrastive import Contrastive, Siglip

SIZES = (4, 3, 1)  # of three micro-batches; the last holds no pair


class Towers(nn.Module):
    """Two towers with dropout, a counter of passes, and an auxiliary loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.image = nn.Sequential(nn.Linear(5, 16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, 6))
        self.text = nn.Sequential(nn.Linear(7, 16), nn.Dropout(0.3), nn.Linear(16, 6))
        self.logit_scale = nn.Parameter(torch.tensor([1.5]))
        self.logit_bias = nn.Parameter(torch.tensor([-1.0]))
        self.register_buffer("passes", torch.zeros(()))
        self.double()

    def forward(self, present, inputs, labels=None, ids=None):
        self.passes += 1
        features = {IMAGE: self.image(inputs[IMAGE]["x"]), TEXT: self.text(inputs[TEXT]["x"])}
        aux = 0.01 * features[IMAGE].square().mean()
        return MultimodalMoEOutput(features=features, losses={"aux": aux}, routing={})


def micro_batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(2)
    batches = []
    for size in SIZES:
        present = torch.ones(size, 2, dtype=torch.bool)
        present[0, 1] = False
        inputs = {
            name: {"x": torch.randn(size, width, generator=generator).double()}
            for name, width in ((IMAGE, 5), (TEXT, 7))
        }
        batches.append(Batch.of([str(i) for i in range(size)], present, inputs))
    return batches


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]


@pytest.mark.parametrize("objective", [Contrastive(), Siglip(variant="chunked", chunk=3)])
def test_micro_batches_have_value_and_gradient_of_the_whole_step(objective):
    batches, model = micro_batches(), Towers()
    torch.manual_seed(3)  # the draws of the one pass below
    outputs = [model(**batch) for batch in batches]
    features = {name: torch.cat([out.features[name] for out in outputs]) for name in (IMAGE, TEXT)}
    present = torch.cat([batch.present for batch in batches])
    own = {"logit_scale": model.logit_scale, "logit_bias": model.logit_bias}
    pairs = objective.from_features(features, present, own)
    whole = pairs + sum(out.losses["aux"] for out in outputs) / len(batches)
    whole.backward()
    expected, drawn = gradients(model), torch.rand(())

    model = Towers()
    cache = GradCache(objective)
    torch.manual_seed(3)
    cache.begin(model, batches)
    losses = []
    for batch in batches:
        loss, parts, output = cache(model, batch)
        assert parts["contrastive"].item() == pytest.approx(pairs.item(), abs=1e-12)
        assert output.features[IMAGE].requires_grad
        (loss / len(batches)).backward()
        losses.append(loss.item() / len(batches))
    assert sum(losses) == pytest.approx(whole.item(), abs=1e-12)
    assert torch.rand(()) == drawn  # the generator stands where one pass leaves it
    assert model.passes == len(batches)  # the first pass left no trace
    for mine, theirs in zip(gradients(model), expected, strict=True):
        assert torch.allclose(mine, theirs, rtol=0, atol=1e-12)
    assert max(grad.abs().max() for grad in expected) > 1e-2


def test_plain_accumulation_is_another_loss():
    """What the cache is for: micro-batches alone see fewer negatives."""
    batches, model = micro_batches(), Towers().eval()
    alone = [Contrastive()(model, batch)[1]["contrastive"].item() for batch in batches]
    cache = GradCache(Contrastive())
    model.image[2].p = model.text[1].p = 0.0
    cache.begin(model, batches)
    together = cache(model, batches[0])[1]["contrastive"].item()
    assert together > sum(alone) / len(alone) + 0.1


def test_a_locked_tower_takes_part_without_a_graph():
    batches, model = micro_batches(), Towers()
    model.image.requires_grad_(False)
    model.text.requires_grad_(True)
    cache = GradCache(Contrastive())
    cache.begin(model, batches)
    loss, _, output = cache(model, batches[0])
    loss.backward()
    assert not output.features[IMAGE].requires_grad
    assert all(p.grad is None for p in model.image.parameters())
    assert all(p.grad.abs().sum() > 0 for p in model.text.parameters())
    assert math.isfinite(loss.item())
