"""Trains a sparse multimodal model: `deepspeed launch/train.py --deepspeed ds_configs/zero2.json`.

Without further flags it runs the recipe `finetune/recipes/emoji_replay.yaml` on embedded data.
`torchrun --nproc_per_node N launch/train.py ...`, `srun python launch/train.py ...` and
`python launch/train.py ...` take the same flags. `--doctor` examines the machine instead.
"""

from __future__ import annotations

import sys

from launch import doctor
from mm_moe.training.early_signals import EarlySignals


def main(argv: list[str], *, early: EarlySignals | None = None) -> int:
    """Read the flags, then hand over; `early`: the signals that came before."""
    if doctor.asked_for(argv):
        return doctor.main(argv)
    from launch.cli import RecipeParser
    from launch.own_flags import complete
    from mm_moe.training import runtime, slurm

    slurm.adopt()
    line = complete(argv)
    parser = RecipeParser()
    values = parser.namespace(line.argv, recipe=line.recipe)
    if line.told and runtime.is_main():
        print(line.told, flush=True)
    # DeepSpeed comes in only now: a wrong flag is told in seconds, and the environment is set.
    from launch.finish import plan_command
    from launch.run import execute
    from mm_moe.training.failures import told_plainly

    with told_plainly(plan=plan_command(line.argv)):
        execute(parser, values, line.argv, recipe=line.recipe, early=early)
    return 0


def program() -> None:
    """The whole program: a signal is noted from here on, however long the imports take."""
    if doctor.asked_for(sys.argv[1:]):  # before anything that may not import
        sys.exit(doctor.main(sys.argv[1:]))
    early = EarlySignals().listen()
    try:
        from launch.cli import run_program
    except KeyboardInterrupt:
        sys.exit(130)
    run_program(lambda argv: main(argv, early=early))


if __name__ == "__main__":
    program()
