"""What a run needs, before any GPU is booked: `python launch/plan.py --world_size 16 ...`.

Takes every flag of `launch/train.py` and refuses what that refuses, in the same words. Builds the
model without storage, starts no process group, loads no weights, writes nothing but `--json`.

    python launch/plan.py --config finetune/recipes/emoji_replay.yaml \
        --deepspeed ds_configs/zero2.json --world_size 16 --gpus_per_node 8 --gpu H100 --bf16 true
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
from collections.abc import Iterator
from pathlib import Path

from launch.cli import ProgramParser, RecipeParser, run_program
from mm_moe.errors import ConfigError
from mm_moe.registry import nearest


def plan_parser() -> ProgramParser:
    """The flags that training does not have."""
    parser = ProgramParser(description=__doc__, allow_abbrev=False, add_help=False)
    parser.add_argument("--world_size", type=int, default=1, help="processes, one per GPU")
    parser.add_argument("--gpus_per_node", type=int, default=8)
    parser.add_argument("--gpu", default="H100", help="a GPU's name, or cpu")
    parser.add_argument("--gpu_memory_gib", type=float, help="instead of that of --gpu")
    parser.add_argument("--reserve_share", type=float, default=0.1, help="memory to leave free")
    parser.add_argument("--imbalance", type=float, default=1.0, help="fullest process / mean")
    parser.add_argument("--nvlink_gb_s", type=float, default=450.0, help="per GPU, one direction")
    parser.add_argument("--network_gb_s", type=float, default=50.0, help="per GPU between nodes")
    parser.add_argument("--text_tokens", type=int, default=0, help="padded length; 0: the longest")
    parser.add_argument("--real_text_tokens", type=float, default=0.0, help="mean; 0: all real")
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("-h", "--help", action="store_true")
    return parser


def check_machine(options: argparse.Namespace) -> None:
    """Refuse a machine that cannot be.

    Raises:
        ConfigError: names flag, value and rule.
    """
    from launch.planning import CPU
    from mm_moe.training.exchange import GPUS

    known = [*GPUS, CPU]
    if options.gpu not in known:
        raise ConfigError(
            f"unknown --gpu {options.gpu!r}; {nearest(options.gpu, known)} "
            "For another one give the nearest and --gpu_memory_gib."
        )
    for flag in ("world_size", "gpus_per_node"):
        if getattr(options, flag) < 1:
            raise ConfigError(f"--{flag} ({getattr(options, flag)}) must be at least 1.")
    if not 0 <= options.reserve_share < 1:
        raise ConfigError(f"--reserve_share ({options.reserve_share}) must lie in [0, 1).")
    if not options.imbalance >= 1:
        raise ConfigError(
            f"--imbalance ({options.imbalance}) is the fullest process over the mean: at least 1."
        )
    for flag in ("nvlink_gb_s", "network_gb_s", "gpu_memory_gib"):
        value = getattr(options, flag)
        if value is not None and not value > 0:
            raise ConfigError(f"--{flag} ({value}) must be above 0.")
    for flag in ("text_tokens", "real_text_tokens"):
        if not getattr(options, flag) >= 0:
            raise ConfigError(f"--{flag} ({getattr(options, flag)}) must not be negative.")
    nodes, rest = divmod(options.world_size, options.gpus_per_node)
    if nodes and rest:
        raise ConfigError(
            f"--world_size ({options.world_size}) must be a multiple of --gpus_per_node "
            f"({options.gpus_per_node}), or less; try {nodes * options.gpus_per_node}."
        )


@contextlib.contextmanager
def as_if_launched(*, world_size: int, gpus_per_node: int) -> Iterator[None]:
    """What the checks of a run read from a launcher's environment, for their duration."""
    wanted = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(min(world_size, gpus_per_node)),
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def main(argv: list[str]) -> int:
    """Check as training does, work everything out, print it."""
    parser = plan_parser()
    options, words = parser.parse_known_args(argv)
    if options.help:
        print(__doc__)
        parser.print_help()
        print("and all flags of launch/train.py")
        return 0
    recipe = RecipeParser()
    values = recipe.namespace(words)
    check_machine(options)
    if values.experts_over:
        raise ConfigError(
            "the planner knows models of one member; plan each member by itself, without "
            "--experts_over, and add them up."
        )
    from launch.own_models import own_model
    from launch.plan_model import host_memory
    from launch.plan_own import OwnPlanner
    from launch.plan_report import report
    from launch.planning import Machine, Planner
    from launch.run import check
    from mm_moe.training.exchange import GPUS, Links

    with as_if_launched(world_size=options.world_size, gpus_per_node=options.gpus_per_node):
        source = check(values, words)
    deepspeed = values.deepspeed
    planned = copy.copy(values)
    # nothing of the trainer's own start: no engine, no device, no folder
    planned.deepspeed, planned.use_cpu, planned.output_dir = None, True, "unused"
    settings = recipe.build(planned)
    total = GPUS[options.gpu][1] * 2**30 if options.gpu in GPUS else host_memory()
    if options.gpu_memory_gib:
        total = options.gpu_memory_gib * 2**30
    elif options.gpu not in GPUS:
        total /= min(options.world_size, options.gpus_per_node)
    machine = Machine(
        world_size=options.world_size,
        gpus_per_node=min(options.gpus_per_node, options.world_size),
        gpu=options.gpu,
        memory=int(total * (1 - options.reserve_share)),
        links=Links(near=options.nvlink_gb_s * 1e9, far=options.network_gb_s * 1e9),
        imbalance=options.imbalance,
    )
    own = own_model(values.objective) is not None
    planner = (OwnPlanner if own else Planner)(
        settings,
        source,
        machine=machine,
        deepspeed=deepspeed,
        text_tokens=options.text_tokens,
        real_text_tokens=options.real_text_tokens,
    )
    report(planner, options.json)
    return 0


if __name__ == "__main__":
    run_program(main)
