"""Trains a sparse multimodal model: `deepspeed launch/train.py --deepspeed ds_configs/zero2.json`.

Without further flags it runs the recipe `finetune/recipes/emoji_replay.yaml` on embedded data.
`torchrun --nproc_per_node N launch/train.py ...`, `srun python launch/train.py ...` and
`python launch/train.py ...` take the same flags.
"""

from __future__ import annotations

from launch.cli import RecipeParser, run_program
from mm_moe.training import slurm


def main(argv: list[str]) -> int:
    """Read the flags, then hand over."""
    slurm.adopt()
    parser = RecipeParser()
    values = parser.namespace(argv)
    # DeepSpeed comes in only now: a wrong flag is told in seconds, and the environment is set.
    from launch.run import execute

    execute(parser, values, argv)
    return 0


if __name__ == "__main__":
    run_program(main)
