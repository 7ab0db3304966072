"""Blocks that are computed again in the backward pass: the same numbers with less memory."""

from __future__ import annotations

import pytest
import torch

from eval.benchmarks.peak_memory import PeakMemory
from mm_moe.batch import Batch
from mm_moe.models.building import build_model
from mm_moe.models.configuration import MultimodalMoEConfig

SMALL = {"patch_size": 16, "num_blocks": 4, "width": 64, "num_heads": 2, "hidden": 256}


def model(router: str = "topk_softmax"):
    torch.manual_seed(0)
    config = MultimodalMoEConfig(
        backbone_config=SMALL, moe={"num_experts": 2, "router": router}, label_names=["a", "b"]
    )
    return build_model(config).train()


def batch(samples: int = 8) -> Batch:
    torch.manual_seed(1)
    size = model().backbone.processor_needs(SMALL)
    ids = torch.randint(1, 50, (samples, 8))
    return Batch.of(
        [str(i) for i in range(samples)],
        torch.ones(samples, 2, dtype=torch.bool),
        {
            "image": {"pixel_values": torch.randn(samples, 3, size.image_size, size.image_size)},
            "text": {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        },
    )


def gradients(net, data: Batch) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)  # a noisy router draws its noise
    output = net(**data)
    (output.logits.square().sum() + sum(output.losses.values())).backward()
    return {name: parameter.grad for name, parameter in net.named_parameters()}


@pytest.mark.parametrize("router", ["topk_softmax", "noisy_topk"])
@pytest.mark.parametrize("every", [1, 2])
def test_the_same_gradients(router, every):
    data, plain, twice = batch(), model(router), model(router)
    twice.activation_checkpointing_enable(every_n_layers=every)
    assert twice.is_activation_checkpointing
    expected, found = gradients(plain, data), gradients(twice, data)
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, rtol=0, atol=0, msg=name)


def test_less_memory_while_training_only():
    data, net = batch(), model()

    def peak() -> int:
        with PeakMemory() as memory:
            net(**data).logits.sum()
        return memory.peak

    kept = peak()
    net.activation_checkpointing_enable()
    assert peak() < 0.6 * kept
    net.activation_checkpointing_disable()
    assert not net.is_activation_checkpointing
    assert peak() == pytest.approx(kept, rel=0.01)
