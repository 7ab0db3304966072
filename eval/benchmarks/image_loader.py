"""Pictures per second and core: our streams against `webdataset` and open_clip's own pipeline.

    python -m eval.benchmarks.image_loader --quick --data_dir DATA   # within a minute
    python -m eval.benchmarks.image_loader --data_dir DATA           # both sizes; stored

`DATA` holds `openclipart/openclipart.parquet`; without it the embedded emojis are taken. The
pictures are written as JPEG in their own size (96 pixels) and enlarged to 224, once as tar shards,
which all read, and once as Parquet. Every pipeline reads, shuffles, decodes, cuts at random (90 to
100% of the area, bicubic), normalises and batches in one process with one thread; texts are read
and handed on, not tokenized. After a first round, rounds of all pipelines are interleaved, and
their CPU time counts, so that other work on the machine disturbs little; wall time is stored, too.

Ours gives each sample its own keyed chance and resumes exactly; theirs draw from global generators.

The last line is one JSON object: pictures per second, ours / theirs, more is better.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import logging
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import transforms

from eval.benchmarks.moe_layer import RESULTS, describe_machine
from mm_moe.backbones.base import ProcessorNeeds
from mm_moe.batch import IMAGE, TEXT
from mm_moe.data.augment import Augment, Variation
from mm_moe.data.collate import Collator
from mm_moe.data.reading import image_payload
from mm_moe.data.schema import DataSource
from mm_moe.data.sets.columns import ColumnsData
from mm_moe.data.sets.emoji import EmojiData
from mm_moe.data.sets.openclipart import OpenclipartEmojiData
from mm_moe.data.sets.webdataset import WebData
from mm_moe.data.streaming import SampleStream
from mm_moe.models.processing import default_image_processor

SHARDS = 4
BUFFER = 1000  # rows that each pipeline shuffles
CROP = (0.9, 1.0)
THEIRS = ("webdataset", "open_clip")
OURS = ("ours, tar", "ours, Parquet")
Batches = Iterator[Any]


def pictures(data_dir: str | None, count: int) -> list[tuple[bytes, str]]:
    """Real pictures and captions."""
    source: DataSource = OpenclipartEmojiData(data_dir) if data_dir else EmojiData()
    samples = map(source.to_sample, source.stream("train"))
    pairs = ((s.payload.get(IMAGE), s.payload.get(TEXT)) for s in samples)
    found = [(image, text) for image, text in itertools.islice(pairs, count) if image and text]
    return [(image, text) for image, text in found]


def written(pairs: list[tuple[bytes, str]], folder: Path, *, side: int) -> None:
    """The pictures as JPEG of one side, in tar shards and Parquet shards of the same rows."""
    for shard in range(SHARDS):
        rows = [(jpeg(image, side), text) for image, text in pairs[shard::SHARDS]]
        with tarfile.open(folder / f"{shard:03}.tar", "w") as archive:
            for number, (image, text) in enumerate(rows):
                for ending, content in (("jpg", image), ("txt", text.encode())):
                    info = tarfile.TarInfo(f"{number:06}.{ending}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))
        ids = [f"{shard}-{number}" for number in range(len(rows))]
        images, texts = zip(*rows, strict=True)
        table = pa.table({"id": ids, "image": list(images), "text": list(texts)})
        pq.write_table(table, folder / f"{shard:03}.parquet", row_group_size=200)


def jpeg(encoded: bytes, side: int) -> bytes:
    """A picture as JPEG of a side; one that has it already is left as it is."""
    image = Image.open(io.BytesIO(image_payload(encoded)))  # type: ignore[arg-type]
    if image.format == "JPEG" and image.size == (side, side):
        return encoded
    buffer = io.BytesIO()
    image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC).save(
        buffer, "JPEG", quality=90
    )
    return buffer.getvalue()


def ours(source: DataSource, *, side: int, batch: int) -> Batches:
    """Our stream and collator, as a run has them."""
    processor = default_image_processor(ProcessorNeeds(image_size=side))
    collate = Collator(
        modalities=(IMAGE, TEXT),
        processors={IMAGE: processor, TEXT: lambda texts: {"rows": torch.zeros(len(texts))}},
        problem_type="none",
        num_labels=0,
        variation=Variation(
            seed=0, augment=Augment(random_resized_crop=CROP), sizes={IMAGE: (side, side)}
        ),
    )
    stream = SampleStream(source, split="train", batch_size=batch, shuffle_buffer=BUFFER)
    return iter(DataLoader(stream, batch, collate_fn=collate))


def their_transform(side: int) -> Callable[[Image.Image], torch.Tensor]:
    """open_clip's transform for training."""
    import open_clip

    return open_clip.image_transform(side, is_train=True, aug_cfg={"scale": CROP})


def of_webdataset(places: list[str], *, side: int, batch: int) -> Batches:
    """The library's usual pipeline."""
    import webdataset

    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(
                side, scale=CROP, interpolation=transforms.InterpolationMode.BICUBIC
            ),
            transforms.ToTensor(),
            transforms.Normalize((0.48, 0.46, 0.41), (0.27, 0.26, 0.28)),
        ]
    )
    pipeline = webdataset.WebDataset(places, shardshuffle=len(places), empty_check=False)
    pipeline = pipeline.repeat().shuffle(BUFFER).decode("pil").to_tuple("jpg", "txt")
    return iter(pipeline.map_tuple(transform, lambda text: 0).batched(batch))


def of_open_clip(places: list[str], *, side: int, batch: int, count: int) -> Batches:
    """The pipeline of its training program."""
    from open_clip_train import data
    from webdataset.tariterators import tar_file_expander

    # webdataset from 1.0 on gives a mark at the end of each shard, at which open_clip's code fails
    data.tar_file_expander = partial(tar_file_expander, eof_value=None)
    data._SAMPLE_SHUFFLE_SIZE = data._SAMPLE_SHUFFLE_INITIAL = BUFFER
    args = SimpleNamespace(
        train_data="::".join(places), val_data=None, train_num_samples=count, batch_size=batch,
        workers=0, world_size=1, seed=0, dataset_resampled=False,
        train_data_upsampling_factors=None,
    )  # fmt: skip
    loader = data.get_wds_dataset(
        args, their_transform(side), is_train=True, tokenizer=lambda text: [0]
    )
    return itertools.chain.from_iterable(itertools.repeat(loader.dataloader))


def pipelines(folder: Path, *, side: int, batch: int, count: int) -> dict[str, Batches]:
    """All that can be measured here; a peer that is not installed is skipped with a line."""
    tars = sorted(map(str, folder.glob("*.tar")))
    columns = ColumnsData(
        str(folder), image_column="image", text_column="text", id_column="id", train="*.parquet"
    )
    found = {
        OURS[0]: ours(WebData(str(folder)), side=side, batch=batch),
        OURS[1]: ours(columns, side=side, batch=batch),
    }
    makers: dict[str, Callable[[], Batches]] = {
        THEIRS[0]: lambda: of_webdataset(tars, side=side, batch=batch),
        THEIRS[1]: lambda: of_open_clip(tars, side=side, batch=batch, count=count),
    }
    hints = {THEIRS[0]: "webdataset", THEIRS[1]: "open_clip_torch webdataset"}
    for name, make in makers.items():
        try:
            found[name] = make()
        except ImportError as error:
            print(f"{name} is left out: {error}; pip install {hints[name]}")
    return found


def measure(found: dict[str, Batches], *, rounds: int, batches: int) -> dict[str, dict[str, Any]]:
    """CPU and wall seconds of each round, without the first, which fills the shuffles."""
    seconds: dict[str, dict[str, Any]] = {name: {"cpu_s": [], "wall_s": []} for name in found}
    names = list(found)
    for number in range(rounds + 1):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in itertools.islice(found[name], batches):
                pass
            if number:
                seconds[name]["cpu_s"].append(time.process_time() - cpu)
                seconds[name]["wall_s"].append(time.perf_counter() - wall)
    return seconds


def rows_of(
    seconds: dict[str, dict[str, Any]], *, side: int, pictures_per_round: int
) -> list[dict[str, Any]]:
    """A row per pipeline, with our ratio to it."""
    rate = {
        name: pictures_per_round / statistics.median(found["cpu_s"])
        for name, found in seconds.items()
    }
    rows = []
    for name, found in seconds.items():
        ratios = {
            mine: statistics.median(
                t / o for t, o in zip(found["cpu_s"], seconds[mine]["cpu_s"], strict=True)
            )
            for mine in OURS
        }
        rows.append(
            {"side": side, "pipeline": name, "per_s": rate[name], "ratios": ratios, **found}
        )
    return rows


def figures(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Our tar stream against each of theirs, and our Parquet stream likewise."""
    found = {}
    for row in rows:
        if row["pipeline"] not in THEIRS:
            continue
        end = f"{row['pipeline']}_{row['side']}px"
        found[f"images_per_second_vs_{end}"] = row["ratios"][OURS[0]]
        found[f"parquet_images_per_second_vs_{end}"] = row["ratios"][OURS[1]]
    return found


def main() -> None:
    """Measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="few pictures; not stored")
    parser.add_argument("--data_dir", help="folder with openclipart/; default: embedded emojis")
    parser.add_argument("--sides", type=int, nargs="+", default=[96, 224])
    parser.add_argument("--pictures", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=8, help="of a round")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", default="image_loader", help="name of the stored result")
    args = parser.parse_args()
    if args.quick:
        args.pictures, args.rounds, args.batches, args.sides = 1000, 3, 4, args.sides[-1:]
    torch.set_num_threads(1)
    logging.getLogger().setLevel(logging.ERROR)
    os.environ.setdefault("WDS_VERBOSE_CACHE", "0")
    pairs = pictures(args.data_dir, args.pictures)
    rows = []
    for side in args.sides:
        with tempfile.TemporaryDirectory() as name:
            written(pairs, Path(name), side=side)
            found = pipelines(Path(name), side=side, batch=args.batch, count=len(pairs))
            seconds = measure(found, rounds=args.rounds, batches=args.batches)
        rows += rows_of(seconds, side=side, pictures_per_round=args.batches * args.batch)
    for row in rows:
        print(f"{row['side']:4} px {row['pipeline']:14} {row['per_s']:8.0f} pictures/s of one core")
    result = {
        "benchmark": "image_loader",
        "figures": figures(rows),
        "command": "python -m eval.benchmarks.image_loader " + " ".join(sys.argv[1:]),
        "settings": {k: v for k, v in vars(args).items() if k != "data_dir"},
        "rows": rows,
        **describe_machine(),
    }
    if not args.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{args.output}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({k: result[k] for k in ("benchmark", "figures", "machine", "commit")}))


if __name__ == "__main__":
    main()
