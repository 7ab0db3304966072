"""Step time of training against the missing rate: towers run on present rows, or on every row.

    python -m eval.benchmarks.presence --quick    # within a minute on 2 cores
    python -m eval.benchmarks.presence            # every rate and type, stored

A rate of 70% means: 70% of the samples lack something; type "both": half of these the image, half
the text. The peer is the same model that runs both towers on every row of a complete batch and
drops the features of what is missing: equal results (`check_equal`), more work. Both take whole
training steps (forward, backward, SGD) on the same rows in turn; every step measures one tower
alone too. Times are CPU seconds of one thread, which other work on the machine disturbs little.
Figures are ours / peer; `image_encoder_cost_at_70` is the image tower's share at 70%
"both". The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

from eval.benchmarks.moe_layer import RESULTS, describe_machine
from mm_moe.batch import IMAGE, TEXT
from mm_moe.data.missing import MissingProtocol
from mm_moe.models import MultimodalMoEConfig, MultimodalMoEModel, build_model

MODALITIES = (IMAGE, TEXT)
TYPES = (TEXT, IMAGE, "both")
NUM_CLASSES = 10
EOS = 1  # of the small CLIP
MID = {
    "image_size": 112,
    "patch_size": 16,
    "width": 256,
    "num_blocks": 6,
    "num_heads": 4,
    "hidden": 1024,
    "max_text_tokens": 32,
    "projection": 256,
}
QUICK = MID | {"num_blocks": 4, "width": 192, "hidden": 768, "num_heads": 3}
Inputs = dict[str, dict[str, Tensor]]


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="rates 0 and 70, within a minute")
    parser.add_argument("--rates", type=int, nargs="+", default=[0, 30, 50, 70, 90])
    parser.add_argument("--types", nargs="+", choices=TYPES, default=list(TYPES))
    parser.add_argument("--prompt", default="replay", help="a registered prompt")
    parser.add_argument("--batch_size", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.quick:
        args.rates, args.types = [0, 70], ["both"]
    return args


def new_model(backbone: dict[str, int], *, prompt: str) -> MultimodalMoEModel:
    """A dense small CLIP of the given shape with a prompt; every weight is trained."""
    set_seed(0)
    return build_model(
        MultimodalMoEConfig(
            backbone_config=backbone,
            prompt=prompt,
            label_names=[str(i) for i in range(NUM_CLASSES)],
        )
    )


def complete_inputs(num_rows: int, backbone: dict[str, int]) -> Inputs:
    """Random pictures, and texts of full length."""
    generator = torch.Generator().manual_seed(0)
    size, length = backbone["image_size"], backbone["max_text_tokens"]
    ids_BL = torch.randint(3, 4096, (num_rows, length), generator=generator)
    ids_BL[:, -1] = EOS
    return {
        IMAGE: {"pixel_values": torch.randn(num_rows, 3, size, size, generator=generator)},
        TEXT: {"input_ids": ids_BL, "attention_mask": torch.ones_like(ids_BL)},
    }


def presence(num_rows: int, *, kind: str, rate: int) -> Tensor:
    """Bool (B, 2) by the protocol; ids are taken until the batch has exactly the rate's shares."""
    protocol = MissingProtocol(dataset="benchmark", split="train", kind=kind, ratio=rate / 100)
    present_IM = protocol.present([str(i) for i in range(100 * num_rows)], MODALITIES)
    lacking = round(num_rows * rate / 100)
    wanted = {(True, True): num_rows - lacking}
    image = {IMAGE: lacking, TEXT: 0, "both": lacking // 2}[kind]
    wanted |= {(False, True): image, (True, False): lacking - image}
    chosen = []
    for row, pattern in enumerate(map(tuple, present_IM.tolist())):
        if wanted[pattern] > 0:
            wanted[pattern] -= 1
            chosen.append(row)
    return present_IM[chosen]


def packed(inputs: Inputs, present_BM: Tensor) -> Inputs:
    """The payloads of present rows; a modality without any has no entry."""
    return {
        name: {key: value[present_BM[:, m]] for key, value in inputs[name].items()}
        for m, name in enumerate(MODALITIES)
        if present_BM[:, m].any()
    }


def full_logits(model: MultimodalMoEModel, present_BM: Tensor, inputs: Inputs) -> Tensor:
    """The peer's forward pass: every tower on every row, then features of missing rows zeroed.

    A row still gets the prompt of its pattern; that of a tower which it lacks is any (zeroed).
    """
    rows_B = torch.arange(len(present_BM))
    edits = model.prompt.start(present_BM, dict.fromkeys(MODALITIES, rows_B))
    features = {}
    for m, name in enumerate(MODALITIES):
        feature_BD, _ = model.backbone.encode(name, inputs[name], edits.get(name))
        features[name] = feature_BD * present_BM[:, m, None]
    logits_BC, _ = model._logits(features, present_BM)
    assert logits_BC is not None  # the model has a head
    return logits_BC


def check_equal(model: MultimodalMoEModel, present_BM: Tensor, inputs: Inputs) -> float:
    """Largest difference between the two ways' logits."""
    with torch.no_grad():
        ours_BC = model(present_BM, packed(inputs, present_BM)).logits
        return float((ours_BC - full_logits(model, present_BM, inputs)).abs().max())


def training_step(model: MultimodalMoEModel, logits: Callable[[], Tensor]) -> Callable[[], None]:
    """Forward, backward and one small step of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        logits().square().mean().backward()
        optimizer.step()

    return step


def tower_step(
    model: MultimodalMoEModel, name: str, payload: dict[str, Tensor] | None
) -> Callable[[], None]:
    """Forward and backward of one tower alone, without prompts."""

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model.backbone.encode(name, payload)[0].square().mean().backward()

    return step


def seconds(step: Callable[[], None]) -> float:
    """CPU time of one call; on one thread the wall time of a machine that does nothing else."""
    start = time.process_time()
    step()
    return time.process_time() - start


def measure(
    model: MultimodalMoEModel, inputs: Inputs, *, kind: str, rate: int, repeats: int
) -> dict[str, Any]:
    """Median seconds of all steps, taken in turn, for one rate and type."""
    present_BM = presence(len(inputs[TEXT]["input_ids"]), kind=kind, rate=rate)
    ours = packed(inputs, present_BM)
    steps = {
        "step ours": training_step(model, lambda: model(present_BM, ours).logits),
        "step full": training_step(model, lambda: full_logits(model, present_BM, inputs)),
    }
    for name in MODALITIES:
        steps[f"{name} ours"] = tower_step(model, name, ours.get(name))
        steps[f"{name} full"] = tower_step(model, name, inputs[name])
    difference = check_equal(model, present_BM, inputs)
    if difference > 1e-4:
        raise SystemExit(f"the two ways differ by {difference:.2g}; their times mean nothing.")
    times: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():  # the warm-up
        step()
    for _ in range(repeats):
        for name, step in steps.items():
            times[name].append(seconds(step))
    median = {name: statistics.median(values) for name, values in times.items()}
    return {
        "type": kind,
        "rate": rate,
        "rows": {name: int(present_BM[:, m].sum()) for m, name in enumerate(MODALITIES)},
        "max_difference": difference,
        "time_s": median,
        "cost": {
            part: round(median[f"{part} ours"] / median[f"{part} full"], 3)
            for part in ("step", *MODALITIES)
        },
    }


def figures(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Ours / peer at 70%, and at 0% (what packing costs); None where not measured."""
    cost = {(row["type"], row["rate"]): row["cost"] for row in rows}

    def of(kind: str, rate: int, part: str) -> float | None:
        return cost.get((kind, rate), {}).get(part)

    return {
        "image_encoder_cost_at_70": of("both", 70, IMAGE),
        "text_encoder_cost_at_70": of("both", 70, TEXT),
        "step_cost_at_70": of("both", 70, "step"),
        "image_encoder_cost_at_70_image_missing": of(IMAGE, 70, IMAGE),
        "text_encoder_cost_at_70_text_missing": of(TEXT, 70, TEXT),
        "step_cost_at_0": of("both", 0, "step"),
    }


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table: milliseconds, and ours / peer in percent."""
    print("type   rate  image rows  text rows |  step ours  step full | cost: step  image   text")
    for row in rows:
        time_s, cost = row["time_s"], row["cost"]
        print(
            f"{row['type']:<5} {row['rate']:>4}% {row['rows'][IMAGE]:>11} {row['rows'][TEXT]:>10} |"
            f" {1e3 * time_s['step ours']:>10.1f} {1e3 * time_s['step full']:>10.1f} |"
            f" {cost['step']:>10.0%} {cost[IMAGE]:>6.0%} {cost[TEXT]:>6.0%}"
        )


def main() -> None:
    """Measure every rate and type, print, and store a full run."""
    args = arguments()
    torch.set_num_threads(args.threads)
    backbone = QUICK if args.quick else MID
    model = new_model(backbone, prompt=args.prompt)
    inputs = complete_inputs(args.batch_size, backbone)
    rows = [
        measure(model, inputs, kind=kind, rate=rate, repeats=args.repeats)
        for kind in args.types
        for rate in args.rates
        if rate or kind == args.types[-1]  # with nothing missing the types are one
    ]
    show(rows)
    result = {"benchmark": "presence", "figures": figures(rows), **describe_machine()}
    if not args.quick:
        RESULTS.mkdir(exist_ok=True)
        stored = {**result, "arguments": vars(args), "backbone": backbone, "rows": rows}
        Path(RESULTS, "presence.json").write_text(json.dumps(stored, indent=1))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
