"""What is skipped changes nothing: towers on present rows give what towers on every row give."""

import pytest
import torch

from eval.benchmarks.presence import complete_inputs, figures, full_logits, packed, presence
from mm_moe.models import MultimodalMoEConfig, build_model
from mm_moe.registry import PROMPTS

torch.set_num_threads(1)
TINY = {"image_size": 32, "patch_size": 16, "width": 16, "num_blocks": 4, "num_heads": 2}
TINY |= {"hidden": 24, "max_text_tokens": 6, "projection": 8}


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("moe", [None, {"num_experts": 2, "top_k": 1}])
def test_skipping_a_missing_encoder_equals_running_it(prompt, moe):
    """In float64: equal logits, and equal gradients of every weight."""
    torch.manual_seed(0)
    model = build_model(
        MultimodalMoEConfig(
            backbone_config=TINY,
            prompt=prompt,
            # a tower that gets generated tokens skips nothing
            prompt_config={"generative": False} if prompt == "generative" else {},
            label_names=["x", "y", "z"],
            moe=moe,
        )
    )
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.prompt.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # open closed gates
    present_BM = presence(10, kind="both", rate=70)
    inputs = complete_inputs(10, TINY)
    inputs["image"]["pixel_values"] = inputs["image"]["pixel_values"].double()
    weight_BC = torch.randn(10, 3, dtype=torch.float64)
    logits, gradients = [], []
    for logits_BC in (
        model(present_BM, packed(inputs, present_BM)).logits,
        full_logits(model, present_BM, inputs),
    ):
        model.zero_grad()
        (logits_BC * weight_BC).sum().backward()
        logits.append(logits_BC.detach())
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert torch.allclose(*logits, rtol=0, atol=1e-10)
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=0, atol=1e-9), name


@pytest.mark.parametrize(
    ("kind", "rows"), [("text", [10, 3]), ("image", [3, 10]), ("both", [7, 6])]
)
def test_70_percent_of_10_rows(kind, rows):
    present_BM = presence(10, kind=kind, rate=70)
    assert present_BM.sum(0).tolist() == rows
    assert present_BM.all(1).sum() == 3
    assert present_BM.any(1).all()


def test_figures_are_those_of_their_cells():
    rows = [
        {"type": "both", "rate": 70, "cost": {"step": 0.6, "image": 0.7, "text": 0.8}},
        {"type": "image", "rate": 70, "cost": {"step": 0.5, "image": 0.3, "text": 1.0}},
    ]
    found = figures(rows)
    assert found["image_encoder_cost_at_70"] == 0.7
    assert found["image_encoder_cost_at_70_image_missing"] == 0.3
    assert found["step_cost_at_0"] is None
