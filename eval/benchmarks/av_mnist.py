"""AV-MNIST: each modality alone, their product, joint models, and the product of all (I2M2).

    python -m eval.benchmarks.av_mnist --data_dir DIR         # five seeds; DIR was prepared with
    python launch/prepare_data.py av_mnist --source DIGITS --output DIR --options '{...}'
    python -m eval.benchmarks.av_mnist --data_dir DIR --quick  # one seed, one epoch: does it run?

Stage 1 trains one member at a time: `image`, `audio`, and `image+audio` fused by concatenation and
by a low-rank tensor. Stage 2 takes stage 1's members and trains them together: intra (the product
of image and audio) and I2M2 (the product of image, audio and image+audio), as the authors do; and a
joint model alone once more, as a control of the additional epochs.
Members have the published encoders and heads. All rows of a split are held in memory, and one plain
loop (AdamW, cosine) trains every model. The test split chose nothing: the numbers of the loop were
set on the validation split with one seed. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eval.benchmarks.moe_layer import RESULTS, describe_machine
from eval.metrics import scores
from mm_moe.data.sets.prepared import AvMnistData, PreparedData
from mm_moe.models import ComposedConfig, ComposedModel, MultimodalMoEConfig
from mm_moe.models.modeling import MultimodalMoEModel

BATCH = 64
EVAL_BATCH = 500
LEARNING_RATE, WEIGHT_DECAY, CLIP = 3e-3, 1e-2, 8.0
STAGE_2_LEARNING_RATE = 1e-3
STAGE_1 = {  # name -> member, its fields
    "image": ("image", {}),
    "audio": ("audio", {}),
    "inter concat": ("image+audio", {}),
    "inter low_rank": ("image+audio", {"fusion": "low_rank"}),
}
STAGE_2 = {  # name -> the models of stage 1 whose product it is
    "inter concat longer": ("inter concat",),  # controls: a joint model with as many epochs
    "inter low_rank longer": ("inter low_rank",),
    "intra": ("image", "audio"),
    "i2m2 concat": ("image", "audio", "inter concat"),
    "i2m2 low_rank": ("image", "audio", "inter low_rank"),
}
PUBLISHED = {  # test accuracy in percent, on the published arrays
    "image": 65.1,  # MultiBench (Liang et al. 2021)
    "audio": 42.0,
    "inter concat": 71.7,
    "i2m2": 72.38,  # Madaan et al. 2024
}
DIFFERS = (  # from the published runs
    "data rebuilt by launch/prepare_data.py av_mnist with the options under `recipe`: recordings "
    "and noises of a split are its own, components are fitted on training rows alone",
    "the training rows under `rows`, not 55,000; spectrograms averaged as `audio_pool` says",
    "AdamW with a cosine for the `epochs` of the two stages, not SGD for 30",
    "scored with the running statistics of the batch normalisation; the factors of the low-rank "
    "fusion are trained",
)
CHANNELS = {"image": 3, "audio": 3, "image+audio": 6}
DIGITS = [str(digit) for digit in range(10)]
Split = tuple[dict[str, Tensor], Tensor]
Shapes = dict[str, tuple[int, ...]]


def load(source: PreparedData, split: str, *, rows: int, pool: int) -> Split:
    """Values by modality (float32, scaled) and labels of the first `rows` rows (0: all).

    The spectrogram is averaged over squares of `pool` places.
    """
    stream = itertools.islice(source.stream(split), rows or None)
    samples = [source.to_sample(row) for row in stream]
    values = {}
    for name in source.modalities:
        stack = np.stack([sample.payload[name].array() for sample in samples])
        values[name] = (
            torch.from_numpy(stack.astype(np.float32)) / source.array_shapes[name]["scale"]
        )
    values["audio"] = F.avg_pool2d(values["audio"], pool)
    return values, torch.tensor([sample.label for sample in samples])


def member_fields(shapes: Shapes, member: str, more: dict[str, Any]) -> dict[str, Any]:
    """The configuration of one member: LeNets, fusion, and a head with one hidden layer of 100."""
    modalities = member.split("+")
    config = MultimodalMoEConfig(
        backbone="small",
        backbone_config={
            "arrays": {name: {"shape": list(shapes[name])} for name in modalities},
            "towers": {name: {"channels": CHANNELS[member]} for name in modalities},
        },
        modalities=modalities,
        label_names=DIGITS,
        head_hidden_size=100,
        feature_norm=False,
        **more,
    )
    return config.to_dict()


def composed(
    members: dict[str, dict[str, Any]], built: dict[str, MultimodalMoEModel] | None = None
) -> ComposedModel:
    """The product of these members."""
    config = ComposedConfig(modalities=["image", "audio"], members=members, label_names=DIGITS)
    return ComposedModel(config, members=built)


def batch_of(values: dict[str, Tensor], rows: Tensor | slice) -> dict[str, Any]:
    """Complete rows as the arguments of a model."""
    inputs = {name: {"values": value[rows]} for name, value in values.items()}
    count = len(next(iter(inputs.values()))["values"])
    return {"present": torch.ones(count, len(inputs), dtype=torch.bool), "inputs": inputs}


def train(
    model: ComposedModel, data: Split, *, epochs: int, rate: float, generator: torch.Generator
) -> None:
    """One cross-entropy on the combined logits."""
    values, labels = data
    steps_per_epoch = len(labels) // BATCH
    total = epochs * steps_per_epoch
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * min(step, total) / total))
    )
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(labels), generator=generator)
        for rows in order.split(BATCH)[:steps_per_epoch]:
            loss = F.cross_entropy(model(**batch_of(values, rows)).logits, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model: ComposedModel, data: Split) -> float:
    """Percent of a split."""
    values, labels = data
    model.eval()
    found = [
        model(**batch_of(values, slice(start, start + EVAL_BATCH))).logits
        for start in range(0, len(labels), EVAL_BATCH)
    ]
    logits = torch.cat(found).numpy()
    task = {"problem_type": "single_label_classification", "num_labels": logits.shape[1]}
    return 100 * scores(logits, labels.numpy(), task=None, **task)["accuracy"]


def run_seed(
    data: dict[str, Split], *, seed: int, epochs: tuple[int, int]
) -> dict[str, dict[str, float]]:
    """Name -> validation and test accuracy, and the seconds of processor time of its training."""
    shapes: Shapes = {name: tuple(x.shape[1:]) for name, x in data["train"][0].items()}
    results: dict[str, dict[str, float]] = {}
    trained: dict[str, ComposedModel] = {}

    def fit(name: str, model: ComposedModel, count: int, rate: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        begin = time.process_time()
        train(model, data["train"], epochs=count, rate=rate, generator=generator)
        seconds = time.process_time() - begin
        splits = {split: accuracy(model, data[split]) for split in ("validation", "test")}
        results[name] = {**splits, "seconds": seconds}
        trained[name] = model
        print(f"seed {seed} {name:22} {splits['test']:6.2f}  ({seconds:.0f} s)", flush=True)

    for name, (member, more) in STAGE_1.items():
        torch.manual_seed(seed)
        model = composed({member: member_fields(shapes, member, more)})
        fit(name, model, epochs[0], LEARNING_RATE)
    for name, parts in STAGE_2.items():
        built, fields = {}, {}
        for part in parts:
            member, more = STAGE_1[part]
            fields[member] = member_fields(shapes, member, more)
            copy = composed({member: fields[member]})
            copy.load_state_dict(trained[part].state_dict())
            built[member] = copy.member(member)
        fit(name, composed(fields, built), epochs[1], STAGE_2_LEARNING_RATE)
    return results


def spread(values: list[float]) -> dict[str, float]:
    """Mean and standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": deviation}


def figures(table: dict[str, Any], by_seed: list[dict[str, Any]]) -> dict[str, float]:
    """Differences in points of test accuracy, paired by seed."""
    found: dict[str, float] = {}
    for fusion in ("concat", "low_rank"):
        for peer in ("intra", f"inter {fusion}", f"inter {fusion} longer"):
            gains = [r[f"i2m2 {fusion}"]["test"] - r[peer]["test"] for r in by_seed]
            found[f"i2m2_{fusion}_minus_{peer.replace(' ', '_')}_points"] = statistics.fmean(gains)
            found[f"i2m2_{fusion}_minus_{peer.replace(' ', '_')}_std"] = spread(gains)["std"]
    found["i2m2_concat_accuracy"] = table["i2m2 concat"]["test"]["mean"]
    return found


def arguments() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, nargs=2, default=[4, 2], help="of the two stages")
    parser.add_argument("--train_rows", type=int, default=0, help="first so many; 0: all")
    parser.add_argument("--validation_rows", type=int, default=0)
    parser.add_argument("--test_rows", type=int, default=0)
    parser.add_argument("--audio_pool", type=int, default=1, help="places averaged, each way")
    parser.add_argument(
        "--partial", type=Path, help="file that keeps finished seeds; a second run goes on with it"
    )
    parser.add_argument("--quick", action="store_true", help="one seed, one epoch; not stored")
    parser.add_argument("--output", default="av_mnist", help="name of the stored result")
    return parser.parse_args()


def all_seeds(
    options: argparse.Namespace, data: dict[str, Split], epochs: tuple[int, int]
) -> dict[str, dict[str, Any]]:
    """Seed -> its results; finished seeds are read from the partial file."""
    done: dict[str, dict[str, Any]] = {}
    key = json.dumps([str(options.data_dir), options.audio_pool, epochs, _rows(data)])
    if options.partial and options.partial.is_file():
        kept = json.loads(options.partial.read_text())
        done = kept["seeds"] if kept["key"] == key else {}
    for seed in options.seeds[:1] if options.quick else options.seeds:
        if str(seed) not in done:
            done[str(seed)] = run_seed(data, seed=seed, epochs=epochs)
        if options.partial:
            options.partial.write_text(json.dumps({"key": key, "seeds": done}))
    return done


def _rows(data: dict[str, Split]) -> dict[str, int]:
    return {split: len(labels) for split, (_, labels) in data.items()}


def main() -> None:
    """Train, print, store."""
    options = arguments()
    torch.set_num_threads(1)
    source = AvMnistData(str(options.data_dir))
    data = {
        split: load(source, split, rows=getattr(options, f"{split}_rows"), pool=options.audio_pool)
        for split in ("train", "validation", "test")
    }
    epochs = (1, 1) if options.quick else (options.epochs[0], options.epochs[1])
    done = all_seeds(options, data, epochs)
    by_seed = list(done.values())
    table = {
        name: {key: spread([r[name][key] for r in by_seed]) for key in by_seed[0][name]}
        for name in by_seed[0]
    }
    for name, row in table.items():
        published = PUBLISHED.get("i2m2" if name.startswith("i2m2") else name)
        beside = f"  published {published}" if published else ""
        print(f"{name:22} {row['test']['mean']:.2f} +- {row['test']['std']:.2f}{beside}")
    result = {
        "benchmark": "av_mnist",
        "figures": figures(table, by_seed),
        "seeds": [int(seed) for seed in done],
        "epochs": list(epochs),
        "rows": _rows(data),
        "audio_pool": options.audio_pool,
        "recipe": source.info["options"],
        "table": table,
        "by_seed": done,
        "published": PUBLISHED,
        "differs": list(DIFFERS),
        **describe_machine(),
    }
    if not options.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{options.output}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: result[k] for k in ("benchmark", "figures", "machine", "commit")}))


if __name__ == "__main__":
    main()
