"""A published sparse model as `--pretrained`: every rank gets the experts of its global ids."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.harness import run_distributed

pytestmark = pytest.mark.distributed
SMALL = {"width": 16, "num_blocks": 4, "hidden": 24, "projection": 8, "vocab_size": 50}
PYRAMID = {"num_experts": [2, 4], "top_k": 2, "use_residual": True}


def fields() -> dict:
    return {"backbone_config": SMALL, "moe": PYRAMID, "moe_mode": "second_half"}


def take_over(rank: int, world_size: int, folder: str) -> dict[int, dict]:
    """What this rank holds by expert-parallel size."""
    return {ep_size: facts_of(rank, folder, ep_size) for ep_size in (1, 2)}


def facts_of(rank: int, folder: str, ep_size: int) -> dict:
    from safetensors.torch import load_file

    from mm_moe.models import MultimodalMoEConfig, build_model
    from mm_moe.moe.parallel import is_expert_parameter, make_expert_parallel, moe_layers

    torch.manual_seed(100 + rank)  # whatever a rank draws on its own, the weights are the folder's
    model = build_model(MultimodalMoEConfig(num_labels=2, **fields()), pretrained=folder)
    make_expert_parallel(model, ep_size=ep_size)
    published = load_file(f"{folder}/model.safetensors")
    group_rank = rank % ep_size
    facts = {"experts": [], "replicated": 0}
    for name, parameter in model.named_parameters():
        if not name.startswith("backbone."):
            continue
        whole = published[name]
        if is_expert_parameter(parameter):
            share = len(whole) // ep_size
            ids = torch.arange(group_rank * share, (group_rank + 1) * share)
            assert torch.equal(parameter, whole[ids]), name
            facts["experts"].append(len(whole))
        else:
            assert torch.equal(parameter, whole), name
            facts["replicated"] += 1
    facts["first"] = [layer.first_expert for layer in moe_layers(model).values()]
    return facts


def test_each_rank_holds_the_experts_of_its_global_ids_bit_for_bit(tmp_path):
    from mm_moe.models import MultimodalMoEConfig, build_model

    torch.manual_seed(0)
    source = build_model(MultimodalMoEConfig(num_labels=0, upcycle_noise=0.5, **fields()))
    source.save_pretrained(tmp_path)
    ranks = run_distributed(take_over, 2, str(tmp_path), timeout_s=200)
    for rank, found in enumerate(ranks):
        for facts in found.values():
            # two towers, blocks with 2 and 4 experts, four tensors each
            assert facts["experts"] == [2, 2, 2, 2, 4, 4, 4, 4] * 2
            assert facts["replicated"] > 40
        assert found[1]["first"] == [0, 0, 0, 0]
        assert found[2]["first"] == [rank, 2 * rank] * 2
