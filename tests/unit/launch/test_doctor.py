"""Every check of `train.py --doctor` fails where there is something to mend, and says what."""

from __future__ import annotations

import importlib.metadata
import resource
import socket
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from launch import doctor
from launch import doctor_machine as machine
from launch.doctor_machine import FAIL, OK, WARN, Finding, Patient

ROOT = Path(__file__).parents[3]
Usage = namedtuple("Usage", "total used free")


def patient(*argv: str, **environ: str) -> Patient:
    return Patient(list(argv), None, False, environ)


def told(finding: Finding, level: str, *words: str) -> None:
    assert finding.level == level, finding
    assert finding.mend
    for word in words:
        assert word in f"{finding.said} {finding.mend}", finding


def test_an_old_python(monkeypatch):
    monkeypatch.setattr(machine, "LEAST_PYTHON", (99, 0))
    told(machine.python_version(patient()), FAIL, "Python 99.0")


def test_packages_that_are_missing_or_too_old(monkeypatch):
    monkeypatch.setattr(
        importlib.metadata,
        "requires",
        lambda name: ["numpy>=999", "no-such-package-here>=1", "h5py>=999; extra == 'x'"],
    )
    finding = machine.packages(patient())
    told(finding, FAIL, "numpy", "is not >=999", "no-such-package-here is missing", "pip install")
    assert "h5py" not in finding.said


def test_a_package_that_is_not_installed(monkeypatch):
    def none(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", none)
    told(machine.packages(patient()), WARN, "pip install -e .")


@pytest.fixture
def broken(tmp_path):
    """An environment in which torch, torchvision and DeepSpeed do not import."""
    for name in ("torch", "torchvision", "deepspeed"):
        (tmp_path / f"{name}.py").write_text("raise ImportError('operator nms does not exist')")
    return {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"}


def test_packages_that_do_not_import(broken):
    told(machine.torch_pair(patient(**broken)), FAIL, "nms does not exist", "torch torchvision")
    told(machine.deepspeed_import(patient(**broken)), FAIL, "nms does not exist", "deepspeed")


def test_processes_that_cannot_talk(broken):
    told(machine.communication(patient(**broken)), FAIL, "gloo", "nms does not exist")


def test_a_process_that_never_answers():
    code = "import time; time.sleep(60)"
    good, said = machine.probe(code, environ={}, timeout_s=0.2)
    assert not good
    assert "no answer" in said


def test_a_gpu_that_torch_does_not_see(monkeypatch):
    monkeypatch.setattr(machine, "gpu_names", lambda environ: [])
    monkeypatch.setattr(machine.shutil, "which", lambda name: f"/usr/bin/{name}")
    told(machine.devices(patient()), WARN, "CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(machine, "gpu_names", lambda environ: ["H100", "H100"])
    assert machine.devices(patient()) == Finding(OK, "2 GPU(s): H100")


def test_nothing_that_compiles(tmp_path):
    empty = {"TORCH_EXTENSIONS_DIR": str(tmp_path), "PATH": str(tmp_path)}
    told(machine.operator(patient(**empty)), FAIL, "C++ compiler", "ninja", "g++")
    (tmp_path / "deepspeed_shm_comm_op.so").touch()
    assert machine.operator(patient(**empty)).level == OK


def test_a_port_in_use():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        told(machine.ports(patient(MASTER_PORT=port)), WARN, port, "--master_port")


def test_little_shared_memory(monkeypatch):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda place: Usage(0, 0, 64 * 2**20))
    told(machine.shared_memory(patient()), WARN, "--shm-size")
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda place: Usage(0, 0, 2**20))
    told(machine.shared_memory(patient()), FAIL, "--shm-size")


def test_few_open_files(monkeypatch):
    for limit, level in ((128, FAIL), (1024, WARN)):
        monkeypatch.setattr(resource, "getrlimit", lambda what, limit=limit: (limit, limit))
        told(machine.open_files(patient()), level, str(limit), "ulimit")


def test_folders_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    places = {"HF_HOME": str(tmp_path / "file" / "cache"), "TMPDIR": str(tmp_path)}
    told(machine.write_rights(patient(**places)), FAIL, "HF_HOME", "'")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_clock_and_a_locale_of_old(monkeypatch):
    monkeypatch.setattr(machine.locale, "getpreferredencoding", lambda ask: "ANSI_X3.4-1968")
    told(machine.clock_and_locale(patient()), WARN, "LC_ALL")

    class Old(machine.datetime.datetime):
        @classmethod
        def now(cls, zone=None):
            return cls(1970, 1, 1)

    monkeypatch.setattr(machine.datetime, "datetime", Old)
    told(machine.clock_and_locale(patient()), FAIL, "1970")


def test_a_token_is_seen_and_not_read_out(tmp_path):
    home = {"HF_HOME": str(tmp_path)}
    told(machine.hub_token(Patient([], None, True, home)), FAIL, "HF_TOKEN")
    assert machine.hub_token(Patient([], None, False, home)).level == OK
    finding = machine.hub_token(patient(**home, HF_TOKEN="hf_secret"))
    assert finding == Finding(OK, "HF_TOKEN is set")


def test_an_allocation_without_steps():
    job = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}
    told(machine.slurm(patient(**job)), WARN, "4 task(s)", "srun")
    told(machine.slurm(patient(**job, SLURM_STEP_ID="0")), FAIL, "SLURM_PROCID")
    assert machine.slurm(patient(**job, SLURM_STEP_ID="0", SLURM_PROCID="1")).level == OK


SMALL = ("--output_dir", "run", "--compare_with", "none", "--max_steps", "20", "--save_steps", "5")


def test_a_run_that_would_be_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told(doctor.settings(patient("--dataset", "emojis")), FAIL, "'emojis'", "emoji")
    assert doctor.settings(patient(*SMALL)).level == OK
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    size, kept = doctor.checkpoint_bytes(patient(*SMALL, "--save_total_limit", "3"))
    assert kept == 3
    assert 10e6 < size < 1e9
    for free, level in ((1000, FAIL), (int(size * 5), WARN)):
        monkeypatch.setattr(doctor.shutil, "disk_usage", lambda place, free=free: Usage(0, 0, free))
        told(doctor.disk(patient(*SMALL)), level, "--save_total_limit")


def test_a_check_that_breaks_is_a_line_and_the_report_ends_with_its_status(monkeypatch, capsys):
    def breaks(patient: Patient) -> Finding:
        raise RuntimeError("two\nlines")

    def well(patient: Patient) -> Finding:
        return Finding(OK, "well")

    names = [name for name, _ in doctor.CHECKS]
    monkeypatch.setattr(doctor, "CHECKS", [(name, well) for name in names])
    monkeypatch.setattr(doctor, "RUN_CHECKS", (("run", well), ("disk", well)))
    assert doctor.main(["--doctor"]) == 0
    assert capsys.readouterr().out.endswith("ready to train\n")
    monkeypatch.setattr(doctor, "CHECKS", [(name, breaks) for name in names])
    assert doctor.main(["--doctor"]) == 2
    said = capsys.readouterr().out
    assert "RuntimeError: two lines" in said
    assert "not looked at" in said
    assert len(said.splitlines()) == len(names) + 3


def test_words_of_the_command_line():
    found = doctor.patient_of(["--doctor", "--output-dir=x", "--push_to_hub", "--seed", "1"])
    assert (found.output_dir, found.pushes) == ("x", True)
    assert "--doctor" not in found.argv
    assert not doctor.patient_of(["--push_to_hub", "false"]).pushes


def test_the_program_answers_where_torch_does_not_import(broken):
    path = f"{broken['PYTHONPATH']}:{ROOT}"
    done = subprocess.run(
        [sys.executable, ROOT / "launch" / "train.py", "--doctor"],
        env={**broken, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "FAIL  torch" in done.stdout
    assert "FAIL  deepspeed" in done.stdout
    assert "to mend:" in done.stdout.splitlines()[-1]
    assert "Traceback" not in done.stderr
