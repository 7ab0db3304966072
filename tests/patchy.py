"""A data set with every kind of hole, a small sparse model for it, and a scorer of the two."""

from __future__ import annotations

import io

import datasets
import torch
from PIL import Image

from launch.scoring import Scorer
from mm_moe.batch import Sample
from mm_moe.data.schema import DataSource
from mm_moe.models import MultimodalMoEConfig, MultimodalMoEModel, build_model
from mm_moe.models.processing import processors_for

NUM_ROWS = 40
NO_IMAGE, NO_TEXT, EMPTY, BROKEN, UNLABELLED = (3, 17), (5, 20), (8,), (9, 10), (11,)


class Patchy(DataSource):
    """Rows that lack an image, a text, both or a label by nature, or whose image is broken."""

    name = "patchy"
    modalities = ("image", "text")
    label_names = ("even", "odd")
    problem_type = "single_label_classification"
    license = "none"

    def splits(self) -> tuple[str, ...]:
        return ("train", "validation", "test")

    def stream(self, split: str) -> datasets.IterableDataset:
        rows = [{"number": number} for number in range(NUM_ROWS)]
        return datasets.Dataset.from_list(rows).to_iterable_dataset()

    def to_sample(self, row: dict) -> Sample:
        number = row["number"]
        payload = {
            "image": picture(number),
            "text": f"row number {number}" + " more" * (number % 5),
        }
        if number in BROKEN:
            payload["image"] = b"no picture"
        for name, without in (("image", NO_IMAGE + EMPTY), ("text", NO_TEXT + EMPTY)):
            if number in without:
                del payload[name]
        return Sample(f"row-{number}", payload, None if number in UNLABELLED else number % 2)

    def size(self, split: str) -> int:
        return NUM_ROWS

    def fingerprint(self) -> str:
        return "0" * 64


def picture(number: int) -> bytes:
    """A PNG of one colour."""
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (6 * number, 255 - 6 * number, 90)).save(out, "PNG")
    return out.getvalue()


def model_of(**moe) -> MultimodalMoEModel:
    """The same random model at every call."""
    torch.manual_seed(0)
    config = MultimodalMoEConfig(
        backbone_config={"patch_size": 16, "num_blocks": 2, "width": 16, "num_heads": 2}
        | {"hidden": 24},
        label_names=list(Patchy.label_names),
        moe={"num_experts": 4, "top_k": 2, **moe},
        moe_layers=[0, 1],
        prompt="replay",
    )
    return build_model(config)


def scorer_of(model: MultimodalMoEModel, **fields) -> Scorer:
    """Batches of seven, so that the last one is short."""
    fields = {"batch_size": 7, "max_bad_samples": 5} | fields
    return Scorer(model, Patchy(), processors_for(model.config, source=None), **fields)
