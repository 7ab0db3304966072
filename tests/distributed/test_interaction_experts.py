"""Interaction experts on 2 processes equal one process: a pass in float64, and whole runs."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.distributed.harness import run_distributed
from tests.distributed.runs import column, train_here, write_recipe

pytestmark = pytest.mark.distributed

BOUND = 1e-11
SEQUENCES = {name: {"width": 3, "length": 1} for name in ("left", "right")}
SAMPLES = {"uneven": [5, 2], "a rank without": [0, 4], "none at all": [0, 0]}
VARIANTS = {"plain": {}, "gated": {"experts_per_kind": 2}, "hard": {"hard": True}}


def model_of(options):
    from mm_moe.models import MultimodalMoEConfig, build_model

    torch.manual_seed(3)
    shape = {"width": 8, "num_blocks": 1, "num_heads": 2, "hidden": 8, "projection": 6}
    config = MultimodalMoEConfig(
        backbone="sequences",
        backbone_config={**shape, "sequences": SEQUENCES},
        modalities=[*SEQUENCES],
        label_names=["no", "yes"],
        interaction_experts={"hidden": 5, "fuser_hidden": 4, **options},
    )
    model = build_model(config).double()
    for parameter in model.head.parameters():
        torch.nn.init.normal_(parameter)
    return model


def batch_of(count, part):
    """Rows `part` of a batch of complete samples and samples that lack the second modality."""
    generator = torch.Generator().manual_seed(7)
    values = torch.randn(2, count, 1, 3, generator=generator, dtype=torch.float64)
    kind = torch.randint(4, (count,), generator=generator)
    present = torch.ones(count, 2, dtype=torch.bool)
    present[::3, 1] = False
    inputs = {}
    for m, name in enumerate(SEQUENCES):
        rows = values[m][part][present[part, m]]
        if len(rows):
            inputs[name] = {"values": rows, "mask": torch.ones(rows.shape[:2], dtype=torch.bool)}
    return {"present": present[part], "inputs": inputs}, kind[part]


def loss_of(model, batch, kind):
    """Sums over samples, so that parts add up; the gate's losses are those of the whole batch."""
    output = model(**batch)
    said = output.interaction
    total = -output.logits[:, 0].sum() - said.log_weight_BK[torch.arange(len(kind)), kind].sum()
    routing = sum(output.losses.values(), torch.zeros((), dtype=torch.float64))
    return total, routing, output


def gap(a, b):
    return (a - b).abs().max().item() if a.numel() else 0.0


def compare(rank, world_size, ep_size, variant, samples):
    from mm_moe.moe.parallel import gather_experts, is_expert_parameter, make_expert_parallel

    whole = model_of(VARIANTS[variant])
    sharded = make_expert_parallel(copy.deepcopy(whole), ep_size=ep_size)
    training = variant != "hard"
    whole.train(training), sharded.train(training)
    counts = SAMPLES[samples]
    start = sum(counts[:rank])
    total, routing, output = loss_of(whole, *batch_of(sum(counts), slice(None)))
    (total + routing).backward()
    own = slice(start, start + counts[rank])
    part, part_routing, said = loss_of(sharded, *batch_of(sum(counts), own))
    (part * world_size + part_routing).backward()
    found = {
        "logits": gap(said.logits, output.logits[own]),
        "gate": gap(part_routing, routing),
        "gradient": 0.0,
    }
    references = dict(whole.named_parameters())
    for name, parameter in sharded.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        if is_expert_parameter(parameter):
            grad = gather_experts(grad, sharded.head.layer) / ep_size
        dist.all_reduce(grad)
        other = references[name].grad
        other = torch.zeros_like(references[name]) if other is None else other
        found["gradient"] = max(found["gradient"], gap(grad / world_size, other))
    moved = [p.grad is not None and bool(p.grad.any()) for p in whole.head.layer.parameters()]
    found["still"] = float(sum(counts) > 0 and not all(moved))
    return found


def compare_all(rank, world_size):
    return {
        (ep_size, variant, samples): compare(rank, world_size, ep_size, variant, samples)
        for ep_size in (1, 2)
        for variant in VARIANTS
        for samples in SAMPLES
    }


def test_two_processes_equal_one_forward_and_backward():
    for cases in run_distributed(compare_all, 2):
        assert len(cases) == 2 * 3 * 3
        wrong = {case: found for case, found in cases.items() if not max(found.values()) <= BOUND}
        assert wrong == {}


RECIPE = """\
# A run of seconds.
dataset: interaction_dial
dataset_options: '{"sizes": [60, 20, 30], "width": 9}'
backbone: sequences
pretrained: none
backbone_config: {width: 16, num_blocks: 1, num_heads: 2, hidden: 24, projection: 8}
moe_enable: false
interaction_experts: true
interaction_config: '{"hidden": 8, "fuser_hidden": 8, "own_coef": 0.5}'
missing_type: both
missing_ratio: 0.4
max_steps: 10
global_batch_size: 4
learning_rate: 3.0e-3
logging_steps: 1
save_strategy: "no"
"""


def write_table(path):
    """Categories of the training rows from the bits that the modalities show."""
    from mm_moe.data.interactions.categories import categorise, soft_categories
    from mm_moe.data.interactions.table import InteractionTable
    from mm_moe.data.sets.interaction_dial import InteractionDialData

    source = InteractionDialData(sizes=[60, 20, 30], width=9)
    label_N, _, truth = source.arrays("train")
    bits = [truth[:, 1], truth[:, 2]]
    probabilities = [np.eye(2)[bit_N] for bit_N in bits]
    InteractionTable(
        dataset=source.name,
        modalities=source.modalities,
        label_names=source.label_names,
        ids=tuple(sample.id for sample in source.index("train")),
        splits=("train",) * len(label_N),
        label_N=label_N,
        code_N=categorise(bits, labels=label_N),
        soft_NQ=soft_categories(probabilities, labels=label_N),
        predictions=dict(zip(source.modalities, bits, strict=True)),
        probabilities=dict(zip(source.modalities, probabilities, strict=True)),
    ).save(path)


def test_runs_of_one_and_two_processes_follow_one_curve_and_publish(tmp_path):
    from transformers import AutoModel

    import mm_moe.models  # noqa: F401  (registers the model type)

    write_table(tmp_path / "table.parquet")
    words = ["--config", write_recipe(tmp_path, RECIPE)]
    words += ["--interaction_table", str(tmp_path / "table.parquet")]
    results = []
    for world_size in (1, 2):
        folder = tmp_path / str(world_size)
        argv = [*words, "--output_dir", str(folder), "--ep_size", str(world_size)]
        results.append(run_distributed(train_here, world_size, [argv], timeout_s=300)[0][0])
    one, two = results
    for key in ("loss", "loss/task", "loss/fuser", "loss/own", "grad_norm"):
        assert len(column(one, key)) == 10
        assert column(two, key) == pytest.approx(column(one, key), rel=1e-4, abs=1e-5)
    assert json.loads((tmp_path / "2" / "run.json").read_text())["ep_size"] == 2
    for condition, metrics in one["scores"]["models"]["no prompts"].items():
        assert two["scores"]["models"]["no prompts"][condition] == pytest.approx(metrics, abs=0.04)
    models = [AutoModel.from_pretrained(tmp_path / str(n) / "final") for n in (1, 2)]
    assert models[1].head.kinds == ("R", "U_first", "U_second", "AS")
    values = torch.randn(9, 1, 9, generator=torch.Generator().manual_seed(0))
    payload = {"values": values, "mask": torch.ones(9, 1, dtype=torch.bool)}
    batch = {"present": torch.ones(9, 2, dtype=torch.bool)}
    batch["inputs"] = {"first": payload, "second": payload}
    one_BC, two_BC = (model.eval()(**batch).logits for model in models)
    assert torch.allclose(two_BC, one_BC, atol=1e-3)
    assert one_BC.std() > 0.01
