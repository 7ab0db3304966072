"""Examines the machine and a run's needs: `python launch/train.py --doctor [flags of the run]`.

One line for each thing, `ok`, `warn` or `FAIL`, with what to mend. Ends with status 0, or with 2 if
something fails. Starts no training and writes nothing that stays. It works where DeepSpeed, torch
or torchvision do not: nothing of them is imported before they have been tried elsewhere.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import os
import shutil
from pathlib import Path

from launch import doctor_machine as machine
from launch.doctor_machine import FAIL, GIB, OK, WARN, Check, Finding, Patient, existing

FLAG = "--doctor"
BYTES_OF_A_WEIGHT = 4  # a checkpoint holds weights and two moments in float32
STATES = 3


def settings(patient: Patient) -> Finding:
    """Everything that training itself would refuse about the flags, the data and the folder."""
    from launch.cli import RecipeParser, quiet
    from launch.own_flags import complete
    from mm_moe.errors import MMMoEError

    quiet()
    try:
        line = complete(patient.argv)
        values = RecipeParser().namespace(line.argv, recipe=line.recipe)
        from launch.checks import check_output, resume_point
        from launch.run import check

        source = check(values, line.argv)
        resume = resume_point(values)
        check_output(values, resume=resume)
    except MMMoEError as error:
        return Finding(FAIL, "the run would be refused", str(error))
    goes_on = f", goes on from {resume.name}" if resume else ""
    return Finding(OK, f"flags and data {source.name!r} are in order{goes_on}")


def disk(patient: Patient) -> Finding:
    """Room for the checkpoints that the run keeps, one more while it is written, and the model."""
    place = existing(Path(patient.output_dir or "runs"))
    free = shutil.disk_usage(place).free
    found = checkpoint_bytes(patient)
    if found is None:
        said = f"{free / GIB:.1f} GiB free; checkpoints of several members are not estimated"
        return Finding(OK, said)
    checkpoint, kept = found
    needed = checkpoint * (kept + 1) + checkpoint // STATES
    said = f"{free / GIB:.1f} GiB free, {needed / GIB:.2f} for {kept} checkpoint(s) and a new one"
    mend = "free some space, or let --save_total_limit 2 keep fewer"
    if free < 2 * needed:
        return Finding(FAIL if free < needed else WARN, said, mend)
    return Finding(OK, said)


def checkpoint_bytes(patient: Patient) -> tuple[int, int] | None:
    """Bytes of one checkpoint, and how many stay at the end of the run; None for members."""
    from launch.cli import RecipeParser
    from launch.own_flags import complete
    from launch.plan_model import meta_model, weightless_config
    from launch.run import check

    line = complete(patient.argv)
    parser = RecipeParser()
    values = parser.namespace(line.argv, recipe=line.recipe)
    source = check(values, line.argv)
    if values.experts_over:
        return None
    values.deepspeed, values.use_cpu, values.report_to = None, True, "none"
    values.output_dir = values.output_dir or "unused"
    built = parser.build(values)
    model = meta_model(built, weightless_config(built, source))
    weights = sum(p.numel() for p in model.parameters())
    learnt = sum(p.numel() for p in model.parameters() if p.requires_grad)
    every = max(1, int(values.save_steps)) if values.save_steps >= 1 else 1
    saved = 0 if values.save_strategy == "no" else max(1, values.max_steps // every)
    kept = min(saved, values.save_total_limit or saved)
    return BYTES_OF_A_WEIGHT * (weights + (STATES - 1) * learnt), kept


CHECKS: tuple[tuple[str, Check], ...] = (
    ("python", machine.python_version),
    ("packages", machine.packages),
    ("torch", machine.torch_pair),
    ("deepspeed", machine.deepspeed_import),
    ("devices", machine.devices),
    ("operator", machine.operator),
    ("communication", machine.communication),
    ("ports", machine.ports),
    ("shared memory", machine.shared_memory),
    ("open files", machine.open_files),
    ("write rights", machine.write_rights),
    ("clock, locale", machine.clock_and_locale),
    ("hub token", machine.hub_token),
    ("slurm", machine.slurm),
)
# Of the run; they import what the ones above have tried, and are left out where those fail.
RUN_CHECKS: tuple[tuple[str, Check], ...] = (("run", settings), ("disk", disk))
NEEDED = ("torch", "deepspeed")


def examine(check: Check, patient: Patient) -> Finding:
    """A check's finding; one that fails in itself is a finding too."""
    try:
        return check(patient)
    except Exception as error:  # any fault of a broken installation; the others go on
        said = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return Finding(FAIL, f"could not be checked ({said})", "see the lines above")


def asked_for(argv: list[str]) -> bool:
    """Whether the command line asks for the examination."""
    return FLAG in argv


def patient_of(argv: list[str]) -> Patient:
    """What a command line asks to examine."""
    words = [word for word in argv if word != FLAG]
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--output_dir", "--output-dir")
    first.add_argument("--push_to_hub", "--push-to-hub", nargs="?", const="true", default="false")
    known = first.parse_known_args(words)[0]
    pushes = known.push_to_hub.lower() in ("true", "1", "yes", "t", "y")
    return Patient(words, known.output_dir, pushes, dict(os.environ))


def line_of(name: str, finding: Finding) -> str:
    """A finding as a line."""
    mend = f" -> {finding.mend}" if finding.mend else ""
    return f"{finding.level:<5} {name:<14} {finding.said}{mend}"


def main(argv: list[str]) -> int:
    """Examine, print, and return the exit status."""
    patient = patient_of(argv)
    levels = {}
    with concurrent.futures.ThreadPoolExecutor(max_workers=4) as pool:  # they wait for processes
        futures = [(name, pool.submit(examine, check, patient)) for name, check in CHECKS]
        for name, future in futures:
            finding = future.result()
            levels[name] = finding.level
            print(line_of(name, finding), flush=True)
    for name, check in RUN_CHECKS:
        if any(levels[needed] == FAIL for needed in NEEDED):
            finding = Finding(WARN, "not looked at", "mend torch and deepspeed first")
        elif levels.get("run") == FAIL:
            finding = Finding(WARN, "not looked at", "mend the run first")
        else:
            finding = examine(check, patient)
        levels[name] = finding.level
        print(line_of(name, finding), flush=True)
    failed = [name for name, level in levels.items() if level == FAIL]
    print(f"{len(failed)} to mend: {', '.join(failed)}" if failed else "ready to train")
    return 2 if failed else 0
