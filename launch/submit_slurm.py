"""Checks, writes and submits a training job: `python launch/submit_slurm.py --nodes 2 -- FLAGS`.

What follows `--` are the flags of `launch/train.py`; what that would refuse is refused here, before
anything waits in a queue. The script is printed and stored beside the run's folder; it is plain
bash, and `sbatch` of it does the same again. Before its time is up the job saves, goes back into
the queue and goes on from there.

    python launch/submit_slurm.py --nodes 2 --gpus_per_node 8 --time 04:00:00 --partition gpu -- \
        --deepspeed ds_configs/zero2.json --bf16 true --output_dir runs/big
"""

from __future__ import annotations

import argparse
import datetime
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from launch.check_slurm import check_folder, check_job, check_training, check_words, local_place
from launch.checks import AUTO
from launch.cli import ROOT, ProgramParser, run_program
from launch.finish import without_flags
from mm_moe.errors import ConfigError

TEMPLATE = Path(__file__).with_name("slurm") / "train.sbatch"
HEADING = "Plain bash: edit it and submit it with sbatch; the folder of --output must exist."


def job_parser() -> ProgramParser:
    """The flags of the job; those of training follow `--`."""
    parser = ProgramParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--nodes", type=int, default=1)
    add("--gpus_per_node", type=int, default=8, help="0: train on CPUs (default 8)")
    add("--processes_per_node", type=int, help="default: one per GPU, or 1")
    add("--cpus_per_task", type=int, default=8, help="cores of a process (default 8)")
    add("--mem", help="memory of a node, such as 200G; default: the cluster's")
    add("--time", default="04:00:00", help="limit of one start (default 04:00:00)")
    add("--partition", help="default: the cluster's")
    add("--account", help="default: yours")
    add("--job_name", help="default: the recipe's name")
    add("--setup", help="a line of bash before training; default: this Python comes first in PATH")
    add("--master_addr", help="address of the first node; default: its name")
    add("--signal_before_s", type=int, default=120, help="seconds kept for saving (default 120)")
    add("--max_requeues", type=int, default=100, help="starts after the first (default 100)")
    add("--sbatch", action="append", default=[], help="a further option: --sbatch=--qos=high")
    add("--dry_run", action="store_true", help="check and print the script; submit nothing")
    return parser


def split_words(argv: list[str]) -> tuple[list[str], list[str]]:
    """The flags of the job and, after `--`, those of training."""
    if "--" not in argv:
        return argv, []
    place = argv.index("--")
    return argv[:place], argv[place + 1 :]


def grouped(words: list[str]) -> list[str]:
    """Flags with their values as lines of bash."""
    groups: list[list[str]] = []
    for word in words:
        if word.startswith("--") or not groups:
            groups.append([])
        groups[-1].append(word)
    return [shlex.join(group) for group in groups]


def render(options: argparse.Namespace, words: list[str], *, program: str, run: Path) -> str:
    """The job's script.

    Args:
        options: checked flags of the job.
        words: flags of training.
        program: the path of `train.py`, as bash reads it.
        run: the run's folder.
    """
    setup = [
        options.setup or f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"'
    ]
    if options.master_addr:
        setup.append(f"export MASTER_ADDR={options.master_addr}")
    values = vars(options) | {
        "heading": HEADING,
        "processes_per_node": options.processes_per_node or options.gpus_per_node or 1,
        "log": str(log_of(run)).replace("%", "%%").replace("%%j", "%j"),
        "run": shlex.quote(str(run)),
        "train": grouped(
            without_flags(words, ("output_dir", "resume_from_checkpoint", "local_rank"))
        ),
        "setup": setup,
        "program": program,
        "resume": AUTO,
    }
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(values)


def log_of(run: Path) -> Path:
    """The job's log, beside the run's folder: that does not exist yet when Slurm opens it."""
    return run.with_name(f"{run.name}-slurm-%j.log")


def submit(script: str) -> str:
    """Hand a script to Slurm and return the job's number.

    Raises:
        ConfigError: Slurm refused, in its own words.
    """
    done = subprocess.run(
        ["sbatch", "--parsable"], input=script, capture_output=True, text=True, check=False
    )
    if done.returncode:
        said = " ".join(line.removeprefix("sbatch: ") for line in done.stderr.splitlines())
        raise ConfigError(f"Slurm refused the job: {said or done.returncode}")
    return done.stdout.strip().split(";")[0]


def prepare(argv: list[str]) -> tuple[argparse.Namespace, Path, str]:
    """Check everything; the job's flags, the run's folder and the script."""
    own, words = split_words(argv)
    options, unknown = job_parser().parse_known_args(own)
    if unknown:
        raise ConfigError(
            f"{unknown[0]!r} is no flag of the job (--help lists them); flags of training come "
            "after a -- that stands alone."
        )
    check_job(options)
    check_words(words)
    if not options.dry_run and shutil.which("sbatch") is None:
        raise ConfigError(
            "there is no sbatch here; submit from a login node of the cluster, or add --dry_run "
            "to see the script."
        )
    processes = options.processes_per_node or options.gpus_per_node or 1
    values = check_training(words, world_size=options.nodes * processes, per_node=processes)
    options.job_name = options.job_name or Path(values.config).stem
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    run = Path(values.output_dir or f"runs/{options.job_name}-{stamp}")
    check_folder(run)
    program = shlex.quote(str(ROOT / "launch" / "train.py"))
    return options, run, render(options, words, program=program, run=run)


def main(argv: list[str]) -> int:
    """Check, print, store, submit, and say how to watch."""
    options, run, script = prepare(argv)
    print(script)
    if reason := local_place(run):
        print(f"warning: can all nodes see --output_dir {str(run)!r}? {reason}.", file=sys.stderr)
    if options.dry_run:
        return 0
    run.parent.mkdir(parents=True, exist_ok=True)
    job = submit(script)
    file = run.with_name(f"{run.name}.sbatch")
    file.write_text(script, encoding="utf-8")
    log = os.fspath(log_of(run)).replace("%j", job)
    print(f"job:      {job} (script {file})")
    print(f"log:      tail -F {shlex.quote(log)}")
    print(f"state:    squeue -j {job}")
    print(f"save now: scancel --batch --signal=USR1 {job}   # and back into the queue")
    print(f"cancel:   scancel {job}")
    return 0


if __name__ == "__main__":
    run_program(main)
