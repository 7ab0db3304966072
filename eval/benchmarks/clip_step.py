"""Our dense contrastive training against `open_clip`'s own training loop, interleaved in one run.

    python -m eval.benchmarks.clip_step --quick             # within a minute on 2 cores
    python -m eval.benchmarks.clip_step                     # ViT-S-32-alt, batches of 32

Both train the same open_clip model, in the same precision, with AdamW and clipping, on the same
emoji pictures and names. Ours is `launch/train.py` as a user starts it; theirs is
`open_clip_train.train.train_one_epoch` as its program calls it. After every few of our steps theirs
takes as many, and one round of both is a sample. Three ways:

- `loop`: each reads and decodes the pictures by its own pipeline, without augmentation and in the
  main process. Our texts are padded to the longest of a batch, theirs always to 77 tokens, which
  computes the same.
- `loop, 77 tokens`: the same, and ours are filled up, too (`--pad_text`): equal work.
- `step`: equal work, and each gets the same decoded batches from memory: training alone.

The last line is one JSON object: samples per second, ours / theirs, more is better.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import TrainerCallback

from eval.benchmarks.moe_layer import RESULTS, describe_machine
from mm_moe.batch import IMAGE, TEXT, Batch

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "launch" / "train.py"
CASES = ("loop", "loop, 77 tokens", "step")
RATE, WEIGHT_DECAY, CLIP = 1e-4, 0.1, 1.0


class Measured(Exception):
    """Ends our training behind its last round."""


def flags(args: argparse.Namespace, folder: Path) -> list[str]:
    """The command line of our program."""
    words = ["--deepspeed", str(ROOT / "ds_configs" / f"{args.ds_configs[0]}.json")]
    words += ["--config", "pretrain/recipes/small_clip.yaml", "--dataset", "emoji"]
    words += ["--dataset_options", "{}", "--model", args.model, "--objective", "contrastive"]
    words += ["--global_batch_size", str(args.batch), "--learning_rate", str(RATE)]
    words += ["--weight_decay", str(WEIGHT_DECAY), "--max_grad_norm", str(CLIP)]
    words += ["--warmup_steps", "0", "--lr_scheduler_type", "constant"]
    words += ["--max_steps", str((args.rounds + 1) * args.steps), "--logging_steps", "100000"]
    words += ["--save_strategy", "no", "--final_evaluation", "false", "--use_cpu", str(args.cpu)]
    words += ["--output_dir", str(folder / "run"), "--bf16", str(args.bf16).lower()]
    return words if args.worker == "loop" else [*words, "--pad_text", "0"]


class Theirs:
    """open_clip's loop over as many batches as ours takes, on a model of the same sizes."""

    def __init__(self, args: argparse.Namespace, loader: Any) -> None:
        import open_clip
        from open_clip_train.train import train_one_epoch

        self.device = torch.device("cpu" if args.cpu else "cuda")
        self.model = open_clip.create_model(args.model, device=self.device, output_dict=True)
        self.loss, self.run = open_clip.ClipLoss(), train_one_epoch
        named = list(self.model.named_parameters())
        plain = [p for name, p in named if p.ndim < 2 or "bn" in name or "ln" in name]
        rest = [p for name, p in named if not (p.ndim < 2 or "bn" in name or "ln" in name)]
        groups: list[dict[str, Any]] = [{"params": plain, "weight_decay": 0.0}]
        groups += [{"params": rest, "weight_decay": WEIGHT_DECAY}]
        self.optimizer = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.98), eps=1e-6)
        self.data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda epoch: None)}
        self.args = SimpleNamespace(
            device=str(self.device), precision="amp_bf16" if args.bf16 else "fp32", distill=False,
            accum_freq=1, skip_scheduler=True, horovod=False, grad_clip_norm=CLIP, rank=0,
            local_rank=0, world_size=1, batch_size=args.batch, log_every_n_steps=100_000,
            wandb=False, log_local=False,
        )  # fmt: skip

    def parameters(self) -> int:
        """Weights of the model."""
        return sum(p.numel() for p in self.model.parameters())

    def __call__(self) -> None:
        """One round."""
        self.run(self.model, self.data, self.loss, 0, self.optimizer, None, None, None, self.args)


class Loader:
    """Gives `steps` batches at a time; what open_clip asks of its loader."""

    def __init__(self, batches: Iterator[Any], *, steps: int, batch: int) -> None:
        self.batches, self.num_batches, self.num_samples = batches, steps, steps * batch

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(self.batches, self.num_batches)


def written_pairs(folder: Path) -> Path:
    """The embedded emojis of the training split as files and open_clip's table of them."""
    from mm_moe.data.sets.emoji import EmojiData

    source = EmojiData()
    lines = ["filepath\ttitle"]
    for number, row in enumerate(source.stream("train")):
        sample = source.to_sample(row)
        file = folder / f"{number}.png"
        file.write_bytes(sample.payload[IMAGE])
        lines.append(f"{file}\t{sample.payload[TEXT]}")
    table = folder / "pairs.tsv"
    table.write_text("\n".join(lines) + "\n")
    return table


def decoded_by_theirs(args: argparse.Namespace, folder: Path) -> Iterator[Any]:
    """Endless batches of open_clip's table reader, shuffled anew in each pass."""
    import open_clip
    from open_clip_train.data import CsvDataset

    size = open_clip.get_model_config(args.model)["vision_cfg"].get("image_size", 224)
    transform = open_clip.image_transform(size, is_train=False)
    tokenizer = open_clip.get_tokenizer(args.model)
    data = CsvDataset(str(written_pairs(folder)), transform, "filepath", "title", "\t", tokenizer)
    loader = torch.utils.data.DataLoader(data, args.batch, shuffle=True, drop_last=True)
    return itertools.chain.from_iterable(itertools.repeat(loader))


def ready_batches(batches: list[Batch]) -> Iterator[Any]:
    """Our decoded batches as open_clip takes them, again and again."""
    pairs = [(one.inputs[IMAGE]["pixel_values"], one.inputs[TEXT]["input_ids"]) for one in batches]
    return itertools.cycle(pairs)


class Rounds(TrainerCallback):
    """Times rounds of our steps, and lets open_clip take one after each."""

    def __init__(self, args: argparse.Namespace, theirs: Callable[[], None]) -> None:
        self.args, self.theirs = args, theirs
        self.ours_s: list[float] = []
        self.theirs_s: list[float] = []
        self.began = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first round warms both up."""
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End of a round: theirs, then ours again."""
        if state.global_step % self.args.steps:
            return
        self.wait()
        self.ours_s.append(time.perf_counter() - self.began)
        begin = time.perf_counter()
        self.theirs()
        self.wait()
        self.theirs_s.append(time.perf_counter() - begin)
        self.began = time.perf_counter()

    def wait(self) -> None:
        """For the device."""
        if not self.args.cpu:
            torch.cuda.synchronize()


def work(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train both in this process; returns seconds per round, without the first."""
    from mm_moe.training.trainer import MultimodalTrainer

    random.seed(0)
    if args.threads:
        torch.set_num_threads(args.threads)
    found: dict[str, Any] = {}
    train = MultimodalTrainer.train

    def measured(self: Any, **kwargs: Any) -> None:
        if args.worker == "step":
            whole = iter(self.get_train_dataloader())
            ready = list(itertools.islice(whole, args.steps))
            batches: Iterator[Any] = ready_batches(ready)
            self.get_train_dataloader = lambda: Endless(ready)
        else:
            batches = decoded_by_theirs(args, folder)
        theirs = Theirs(args, Loader(batches, steps=args.steps, batch=args.batch))
        rounds = Rounds(args, theirs)
        self.add_callback(rounds)
        found["parameters"] = [sum(p.numel() for p in self.model.parameters()), theirs.parameters()]
        train(self, **kwargs)
        found.update(ours_s=rounds.ours_s[1:], theirs_s=rounds.theirs_s[1:])
        raise Measured

    MultimodalTrainer.train = measured  # type: ignore[method-assign, assignment]
    words, sys.argv = sys.argv, [str(TRAIN), *flags(args, folder)]
    try:
        runpy.run_path(str(TRAIN), run_name="__main__")
    except Measured:
        return found
    finally:
        sys.argv = words
        MultimodalTrainer.train = train  # type: ignore[method-assign]
    raise SystemExit("the run ended before its last step")


class Endless(torch.utils.data.DataLoader):
    """A loader of ready batches."""

    def __init__(self, batches: list[Batch]) -> None:
        super().__init__(batches, batch_size=None)  # type: ignore[arg-type]

    def __iter__(self) -> Any:
        return itertools.cycle(self.dataset)  # type: ignore[arg-type]


def run_case(args: argparse.Namespace, case: str, ds_config: str) -> dict[str, Any]:
    """One case in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        words = [sys.executable, "-m", "eval.benchmarks.clip_step", *sys.argv[1:]]
        words += ["--ds_configs", ds_config, "--worker", case, "--folder", name]
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        if args.cpu:
            environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(words, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise SystemExit(f"{case}: {done.stderr[-3000:]}")
        found = json.loads((Path(name) / "found.json").read_text())
    ratios = [t / o for o, t in zip(found["ours_s"], found["theirs_s"], strict=True)]
    samples = args.steps * args.batch
    return {
        "case": case,
        "ds_config": ds_config,
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "ours_samples_per_s": samples / statistics.median(found["ours_s"]),
        "theirs_samples_per_s": samples / statistics.median(found["theirs_s"]),
        **found,
    }


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few small rounds; not stored")
    parser.add_argument("--model", default="ViT-S-32-alt", help="a model of open_clip")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1, help="0: as torch has it")
    parser.add_argument("--ds_configs", nargs="+", default=["zero0", "zero2"])
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--output", default="clip_step", help="name of the stored result")
    parser.add_argument("--worker", default="", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.cpu = not torch.cuda.is_available()
    if args.quick:
        args.batch, args.rounds, args.steps = 8, 4, 1
        args.cases, args.ds_configs = ["loop", "step"], args.ds_configs[:1]
    return args


def main() -> None:
    """Measure, print, store."""
    args = arguments()
    if args.worker:
        found = work(args, args.folder)
        (args.folder / "found.json").write_text(json.dumps(found))
        return
    rows: list[dict[str, Any]] = []
    for ds_config, case in itertools.product(args.ds_configs, args.cases):
        rows.append(run_case(args, case, ds_config))
        row = rows[-1]
        print(
            f"{ds_config:6} {case:16} ours {row['ours_samples_per_s']:8.2f} samples/s, open_clip "
            f"{row['theirs_samples_per_s']:8.2f}: ratio {row['ratio']:.3f} "
            f"({row['ratio_min']:.3f} to {row['ratio_max']:.3f})",
            flush=True,
        )
        result = result_of(args, rows)
        if not args.quick:  # after each case: a full run takes long
            RESULTS.mkdir(exist_ok=True)
            (RESULTS / f"{args.output}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: result[k] for k in ("benchmark", "figures", "machine", "commit")}))


def result_of(args: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What is stored of the cases so far."""
    names = {"loop": "samples_per_second_vs_open_clip", "step": "step_alone_vs_open_clip"}
    names["loop, 77 tokens"] = "equal_work_vs_open_clip"
    setting = ("model", "batch", "steps", "rounds", "threads", "bf16")
    return {
        "benchmark": "clip_step",
        "figures": {f"{names[row['case']]}_{row['ds_config']}": row["ratio"] for row in rows},
        "command": "python -m eval.benchmarks.clip_step " + " ".join(sys.argv[1:]),
        "settings": {name: getattr(args, name) for name in setting},
        "rows": rows,
        **describe_machine(),
    }


if __name__ == "__main__":
    main()
