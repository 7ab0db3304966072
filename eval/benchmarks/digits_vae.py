"""Written and spoken digits in one latent space: the mixture-of-experts autoencoder on pairs.

    python launch/prepare_data.py digit_pairs --source DIGITS --output DIR
    python -m eval.benchmarks.digits_vae --data_dir DIR                  # three seeds, every bound
    python -m eval.benchmarks.digits_vae --data_dir DIR --quick          # a few steps: does it run?
    python -m eval.benchmarks.digits_vae --data_dir DIR --model RUN/final   # scores a finished run

Scores by the definitions of Shi et al. 2019, on the test split, in percent, chance beside:

- latent: a linear classifier of the digit on z, one for each modality, fitted on the locations of
  the training split;
- cross: a picture is made from z drawn from the expert of a recording (and the other way round),
  and a classifier of real pictures (recordings) finds the digit of the source in it;
- joint: both are made from one z of the prior, and the classifiers find the same digit in both.
  Chance is what two independent draws of the digits that they find would give.

The classifiers are trained on the real rows of the training split; their own test accuracy is
reported and bounds what can be reached. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.benchmarks.av_mnist import load, spread
from eval.benchmarks.moe_layer import RESULTS, describe_machine
from mm_moe.batch import Batch
from mm_moe.data.sets.prepared import DigitPairsData
from mm_moe.models.mixture import MixtureVAE, MixtureVAEConfig
from pretrain.mixture import MixtureObjective

NUM_DIGITS = 10
BATCH, LEARNING_RATE = 64, 1e-3  # Adam with amsgrad, as Shi et al. have it
CLASSIFIER_EPOCHS = 5
JOINT_DRAWS = 5000
QUICK_STEPS = 20
METHODS = {  # name -> options of the objective
    "dreg_looser": {"bound": "dreg_looser", "samples": 10},
    "iwae_looser": {"bound": "iwae_looser", "samples": 10},
    "iwae": {"bound": "iwae", "samples": 10},
    "elbo": {"bound": "elbo", "samples": 1},
    "m_elbo": {"bound": "m_elbo", "samples": 1},
}
DIFFERS = (  # from Shi et al.
    "MNIST with spoken digits (28 x 28 spectrograms), not with pictures of house numbers",
    "perceptrons with one hidden layer, fewer draws and far fewer steps (`steps`, `batch`)",
    "one recording for each picture, drawn by a keyed hash; theirs have 20",
)
Split = tuple[dict[str, Tensor], Tensor]


def configuration(data: Split, hidden: int) -> MixtureVAEConfig:
    """Laplace everything, values in (0, 1)."""
    names = list(data[0])
    likelihood = {"kind": "laplace", "scale": 0.75, "unit": True}
    return MixtureVAEConfig(
        modalities=names,
        arrays={name: {"shape": list(x.shape[1:])} for name, x in data[0].items()},
        networks={name: {"hidden": [hidden]} for name in names},
        likelihoods=dict.fromkeys(names, likelihood),
    )


def train(
    model: MixtureVAE, objective: MixtureObjective, data: Split, *, steps: int, seed: int
) -> float:
    """Fit, and return the seconds of processor time."""
    values, labels = data
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, amsgrad=True)
    begin, order = time.process_time(), torch.empty(0, dtype=torch.long)
    present = torch.ones(BATCH, len(values), dtype=torch.bool)
    model.train()
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(labels), generator=generator)
        rows, order = order[:BATCH], order[BATCH:]
        inputs = {name: {"values": x[rows]} for name, x in values.items()}
        loss, _, _ = objective(model, Batch.of([""] * BATCH, present, inputs))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return time.process_time() - begin


def new_classifier() -> nn.Sequential:
    """A small convolutional network for 28 x 28 rows."""
    return nn.Sequential(
        nn.Unflatten(1, (1, -1)),
        nn.Conv2d(1, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.LazyLinear(NUM_DIGITS),
    )


@torch.enable_grad()
def fit_classifier(x: Tensor, labels: Tensor, *, epochs: int) -> nn.Sequential:
    """Trained on real rows."""
    torch.manual_seed(0)
    model = new_classifier()
    model(x[:1])
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(labels)).split(100):
            loss = F.cross_entropy(model(x[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


class Judges:
    """Classifiers of the real rows, one per modality; fitted when they are first asked.

    Args:
        data: what they are trained and tested on.
        epochs: of their training.
        partial: folder that keeps their accuracy.
    """

    def __init__(self, data: dict[str, Split], *, epochs: int, partial: Path | None) -> None:
        self.data, self.epochs = data, epochs
        rows = len(data["train"][1])
        self.kept = partial / f"classifiers-{epochs}-{rows}.json" if partial else None

    @functools.cached_property
    def models(self) -> dict[str, nn.Sequential]:
        """Modality -> classifier."""
        values, labels = self.data["train"]
        return {name: fit_classifier(x, labels, epochs=self.epochs) for name, x in values.items()}

    @torch.no_grad()
    def accuracy(self) -> dict[str, float]:
        """Percent of the test split."""
        if self.kept is not None and self.kept.is_file():
            return json.loads(self.kept.read_text())
        values, labels = self.data["test"]
        found = {
            name: percent(self.models[name](x).argmax(1) == labels) for name, x in values.items()
        }
        _keep(self.kept, found)
        return found


def _keep(file: Path | None, found: dict[str, float]) -> None:
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found))


def linear_accuracy(train_NL: Tensor, train_N: Tensor, test_NL: Tensor, test_N: Tensor) -> float:
    """Percent of a multinomial logistic regression on standardised latents."""
    mean_L, std_L = train_NL.mean(0), train_NL.std(0).clamp(min=1e-6)
    layer = nn.Linear(train_NL.shape[1], NUM_DIGITS)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=60, line_search_fn="strong_wolfe")
    x_NL = (train_NL - mean_L) / std_L

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(layer(x_NL), train_N) + 1e-4 * layer.weight.pow(2).sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[arg-type]
    return percent(layer((test_NL - mean_L) / std_L).argmax(1) == test_N)


def percent(right: Tensor) -> float:
    """Share of true entries."""
    return 100 * right.double().mean().item()


@torch.no_grad()
def coherence(
    model: MixtureVAE, classifiers: Mapping[str, nn.Module], train_data: Split, test_data: Split
) -> dict[str, float]:
    """Name -> percent; see the module."""
    model.eval()
    torch.manual_seed(0)
    (train_x, train_N), (test_x, test_N) = train_data, test_data
    found: dict[str, float] = {}
    for source in model.modalities:
        expert = model.encode(test_x[source], source)
        known = model.encode(train_x[source], source).mean
        found[f"latent_{source}"] = linear_accuracy(known, train_N, expert.mean, test_N)
        for target in model.modalities:
            kind = "reconstruction" if source == target else "cross"
            made = classifiers[target](model.generate_rows(expert.sample(), target))
            found[f"{kind}_{source}_to_{target}"] = percent(made.argmax(1) == test_N)
    z_NL = model.prior().sample(torch.Size([JOINT_DRAWS]))
    said = [
        classifiers[name](model.generate_rows(z_NL, name)).argmax(1) for name in model.modalities
    ]
    shares = [torch.bincount(each, minlength=NUM_DIGITS) / len(each) for each in said]
    found["joint"] = percent(said[0] == said[1])
    found["joint_chance"] = 100 * float((shares[0] * shares[1]).sum())
    found["joint_digits"] = float(((shares[0] > 0.01) & (shares[1] > 0.01)).sum())
    return found


def chance(test_data: Split) -> float:
    """Percent of the most frequent digit: what latent and cross scores are compared with."""
    return 100 * torch.bincount(test_data[1]).max().item() / len(test_data[1])


def arguments() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--hidden", type=int, default=256, help="width of the hidden layers")
    parser.add_argument("--rows", type=int, default=0, help="training rows; 0: all")
    parser.add_argument("--model", type=Path, help="score this folder instead of training")
    parser.add_argument("--partial", type=Path, help="folder that keeps finished trainings")
    parser.add_argument("--quick", action="store_true", help="20 steps, one seed; not stored")
    parser.add_argument("--output", default="digits_vae", help="name of the stored result")
    return parser.parse_args()


def run_one(
    method: str, seed: int, options: argparse.Namespace, judges: Judges
) -> dict[str, float]:
    """Train and score one model; a finished one is read from the partial folder."""
    train_data, test_data = judges.data["train"], judges.data["test"]
    steps = QUICK_STEPS if options.quick else options.steps
    key = f"{method}-{seed}-{steps}-{options.hidden}-{len(train_data[1])}.json"
    kept = options.partial / key if options.partial else None
    if kept is not None and kept.is_file():
        return json.loads(kept.read_text())
    torch.manual_seed(seed)
    model = MixtureVAE(configuration(train_data, options.hidden))
    objective = MixtureObjective(**METHODS[method])  # type: ignore[arg-type]
    seconds = train(model, objective, train_data, steps=steps, seed=seed)
    found = coherence(model, judges.models, train_data, test_data) | {"cpu_seconds": seconds}
    _keep(kept, found)
    line = "  ".join(f"{name} {value:.1f}" for name, value in found.items())
    print(f"{method} seed {seed}: {line}", flush=True)
    return found


def figures(table: dict[str, dict[str, dict[str, float]]], lone_chance: float) -> dict[str, float]:
    """Means of the first method, its chance levels, and how far the others are behind in cross."""
    first = next(iter(table))
    found = {name: each["mean"] for name, each in table[first].items() if name != "cpu_seconds"}
    found["chance"] = lone_chance
    cross = {
        method: statistics.fmean(v["mean"] for k, v in row.items() if k.startswith("cross"))
        for method, row in table.items()
    }
    for method in list(table)[1:]:
        found[f"cross_minus_{method}_points"] = cross[first] - cross[method]
    return found


def main() -> None:
    """Train, print, store."""
    options = arguments()
    torch.set_num_threads(1)
    source = DigitPairsData(str(options.data_dir))
    data = {
        split: load(source, split, rows=options.rows if split == "train" else 0, pool=1)
        for split in ("train", "test")
    }
    epochs = 1 if options.quick else CLASSIFIER_EPOCHS
    judges = Judges(data, epochs=epochs, partial=options.partial)
    own = judges.accuracy()
    print(f"classifiers of real rows: {own}", flush=True)
    if options.model:
        model = MixtureVAE.from_pretrained(options.model)
        print(json.dumps(coherence(model, judges.models, data["train"], data["test"])))
        return
    methods = options.methods[:1] if options.quick else options.methods
    seeds = options.seeds[:1] if options.quick else options.seeds
    by_seed: dict[str, dict[str, dict[str, float]]] = {method: {} for method in methods}
    for seed in seeds:
        for method in methods:
            by_seed[method][str(seed)] = run_one(method, seed, options, judges)
    table = {
        method: {
            name: spread([found[name] for found in runs.values()])
            for name in next(iter(runs.values()))
        }
        for method, runs in by_seed.items()
    }
    result = {
        "benchmark": "digits_vae",
        "figures": figures(table, chance(data["test"])),
        "classifiers": own,
        "seeds": seeds,
        "steps": QUICK_STEPS if options.quick else options.steps,
        "batch": BATCH,
        "hidden": options.hidden,
        "rows": {split: len(labels) for split, (_, labels) in data.items()},
        "methods": {method: METHODS[method] for method in methods},
        "recipe": source.info["options"],
        "table": table,
        "by_seed": by_seed,
        "differs": list(DIFFERS),
        **describe_machine(),
    }
    if not options.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{options.output}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: result[k] for k in ("benchmark", "figures", "machine", "commit")}))


if __name__ == "__main__":
    main()
