"""`python launch/evaluate_run.py --rescore DIR`: published interaction experts, scored again."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any

from eval.interaction_fusion import DEFAULT_TAU
from eval.interaction_report import text, write_page
from eval.interaction_rescore import rescore
from launch.cli import ProgramParser
from mm_moe.data.interactions.published import SETS
from mm_moe.errors import ConfigError, DataError

FLAG = "--rescore"


def asked_for(argv: list[str]) -> bool:
    """Whether a command line is about published artefacts and not about a run."""
    return any(word.split("=")[0] == FLAG for word in argv)


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line.

    Raises:
        ConfigError: a value that cannot work.
    """
    parser = ProgramParser(
        prog="evaluate_run.py --rescore",
        description="Scores published logits of interaction experts under every fusion rule, and "
        "writes rescore.json and rescore.html.",
    )
    add = parser.add_argument
    add(FLAG, type=Path, required=True, metavar="DIR", help="folder of the published artefacts")
    add(
        "--dataset", nargs="+", choices=SETS, default=list(SETS), help="default: all that are there"
    )
    add("--output", type=Path, help="folder to write (default: runs/rescore-NAME)")
    add("--tau", type=float, default=DEFAULT_TAU, help=f"of the cascade (default: {DEFAULT_TAU})")
    add("--resamples", type=int, default=1000, help="of the paired bootstrap (default: 1000)")
    options = parser.parse_args(argv)
    if not 0 <= options.tau <= 1:
        raise ConfigError(f"--tau {options.tau} must lie in [0, 1]: it is a probability.")
    if options.resamples < 1:
        raise ConfigError(f"--resamples {options.resamples} must be at least 1.")
    if options.output is None:
        options.output = Path("runs") / f"rescore-{options.rescore.resolve().name}"
    if options.output.is_file():
        raise ConfigError(f"--output {str(options.output)!r} is a file; name a folder.")
    return options


def main(argv: list[str]) -> int:
    """Read, score, print, write.

    Raises:
        DataError: some of the artefacts deviate from their schema; the others are scored first.
    """
    options = parse(argv)
    done = rescore(
        options.rescore,
        datasets=options.dataset,
        tau=options.tau,
        num_resamples=options.resamples,
    )
    for section in done.sections:
        print(text(section), end="\n\n")
    result: dict[str, Any] = {
        "title": f"Published interaction experts in {options.rescore.resolve().name}, scored again",
        "about": [
            "Answers and labels are joined by id. Nothing is fitted, for the published files hold "
            "no validation logits.",
            *(f"not scored: {title}: {why}" for title, why in done.failures.items()),
        ],
        "command": shlex.join(["python", "launch/evaluate_run.py", *argv]),
        "sections": done.sections,
        "failures": done.failures,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    target = options.output / "rescore.json"
    target.write_text(json.dumps(result, indent=1))
    page = write_page(options.output / "rescore.html", result)
    print(f"written to {target} and {page}")
    if done.failures:
        title, why = next(iter(done.failures.items()))
        count = len(done.failures)
        more = f" ({count} such folders; all are listed in {target})" if count > 1 else ""
        raise DataError(f"{title} was not scored: {why}{more}")
    return 0
