"""Turns a run of `small_clip.yaml` into the weights that ship with the package.

    deepspeed launch/train.py --config pretrain/recipes/small_clip.yaml --data_dir DIR \
        --output_dir RUN
    python -m pretrain.recipes.ship_small_clip --run RUN

DIR holds `openclipart/openclipart.parquet`. About ten minutes on two idle CPU cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mm_moe.backbones.clip_small import SMALL_CLIP_FOLDER
from mm_moe.backbones.weights import save_weights
from mm_moe.models.modeling import MultimodalMoEModel


def main() -> None:
    """Write the dense towers in float16."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of the pretraining run")
    parser.add_argument("--output", type=Path, default=SMALL_CLIP_FOLDER / "model.safetensors")
    options = parser.parse_args()
    model = MultimodalMoEModel.from_pretrained(options.run / "final")
    save_weights(model.backbone, options.output)


if __name__ == "__main__":
    main()
