"""What `--doctor` looks at on the machine. Only the standard library is imported here.

Heavy packages are tried in processes of their own: one that is broken, or ends by a signal, is a
line of the report and not the end of it.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import locale
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

OK, WARN, FAIL = "ok", "warn", "FAIL"
GIB = 2**30
PROBE_TIMEOUT_S = 90
LEAST_PYTHON = (3, 11)
DEFAULT_PORT = 29500  # of torchrun and of the deepspeed launcher
DISTRIBUTION = "mm-moe"
GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # NVIDIA, AMD, Windows' Linux


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        level: `OK`, `WARN` or `FAIL`.
        said: what is the case.
        mend: what to do about it, if something has to be done.
    """

    level: str
    said: str
    mend: str = ""


@dataclass(frozen=True)
class Patient:
    """What is examined.

    Attributes:
        argv: the flags of the run, without `--doctor`.
        output_dir: of the run, if given.
        pushes: whether it publishes.
        environ: of this process.
    """

    argv: list[str] = field(default_factory=list)
    output_dir: str | None = None
    pushes: bool = False
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)


Check = Callable[[Patient], Finding]


def probe(
    code: str, *, environ: Mapping[str, str], timeout_s: float = PROBE_TIMEOUT_S
) -> tuple[bool, str]:
    """Run Python code in a process of its own.

    Returns:
        Whether it succeeded, and its output, or the last line of what it complained about.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            errors="replace",
            env=dict(environ),
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False, f"no answer within {timeout_s:g} s"
    if done.returncode == 0:
        lines = done.stdout.strip().splitlines()
        return True, lines[-1] if lines else ""
    lines = done.stderr.strip().splitlines()
    said = lines[-1][:200] if lines else "no word"
    return False, f"status {done.returncode}: {said}"


def python_version(patient: Patient) -> Finding:
    """Python itself."""
    said = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] < LEAST_PYTHON:
        least = ".".join(map(str, LEAST_PYTHON))
        return Finding(FAIL, said, f"take Python {least} or newer")
    return Finding(OK, said)


def packages(patient: Patient) -> Finding:
    """Installed versions against the bounds of the package."""
    try:
        wanted = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return Finding(WARN, "mm-moe is not installed: bounds unknown", "pip install -e .")
    try:
        from packaging.requirements import Requirement
    except ImportError:
        return Finding(FAIL, "packaging is missing", "pip install -e .")
    wrong = []
    for requirement in map(Requirement, wanted):
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} {version} is not {requirement.specifier}")
    if wrong:
        return Finding(FAIL, "; ".join(wrong), "pip install -e .")
    return Finding(OK, f"{len(wanted)} requirements of {DISTRIBUTION} are met")


def torch_pair(patient: Patient) -> Finding:
    """Torch and the torchvision that was built for it."""
    code = (
        "import torch, torchvision; torchvision.ops.nms(torch.zeros(1, 4), torch.ones(1), 0.5);"
        "print(torch.__version__, 'with torchvision', torchvision.__version__)"
    )
    good, said = probe(code, environ=patient.environ)
    if good:
        return Finding(OK, said)
    mend = "install both together: pip install --upgrade torch torchvision"
    return Finding(FAIL, f"torch and torchvision do not work together ({said})", mend)


def deepspeed_import(patient: Patient) -> Finding:
    """DeepSpeed, which looks for its accelerator when it is imported."""
    code = "import deepspeed; print(deepspeed.__version__)"
    good, said = probe(code, environ={**patient.environ, **_accelerator(patient)})
    if good:
        return Finding(OK, said)
    return Finding(FAIL, f"does not import ({said})", "pip install --upgrade deepspeed")


def _accelerator(patient: Patient) -> dict[str, str]:
    """As the programs start: without a GPU, DeepSpeed is told so."""
    known = patient.environ.get("DS_ACCELERATOR")
    return {} if known or gpu_names(patient.environ) else {"DS_ACCELERATOR": "cpu"}


def gpu_names(environ: Mapping[str, str]) -> list[str]:
    """Names of the GPUs that torch can use; none where torch does not import."""
    if not any(Path(device).exists() for device in GPU_DEVICES):
        return []
    code = (
        "import torch;"
        "print('|'.join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())))"
    )
    good, said = probe(code, environ=environ)
    return [name for name in said.split("|") if name] if good else []


def devices(patient: Patient) -> Finding:
    """GPUs that torch can use, and such as it cannot."""
    names = gpu_names(patient.environ)
    if names:
        return Finding(OK, f"{len(names)} GPU(s): {', '.join(sorted(set(names)))}")
    cores = os.cpu_count() or 1
    if shutil.which("nvidia-smi") or shutil.which("rocm-smi"):
        mend = "install the torch wheel of this driver, and look at CUDA_VISIBLE_DEVICES"
        return Finding(WARN, f"tools of a GPU are here, torch sees none; {cores} cores", mend)
    return Finding(OK, f"no GPU; {cores} CPU cores")


def operator(patient: Patient) -> Finding:
    """DeepSpeed's CPU collective: compiled already, or what compiles it."""
    root = patient.environ.get("TORCH_EXTENSIONS_DIR")
    base = Path(root) if root else Path.home() / ".cache" / "torch_extensions"
    if any(base.glob("**/deepspeed_shm_comm*.so")):
        return Finding(OK, "DeepSpeed's CPU collective is compiled")
    path = patient.environ.get("PATH")
    tools = {"a C++ compiler": ("g++", "c++", "clang++"), "ninja": ("ninja",)}
    missing = [
        name
        for name, programs in tools.items()
        if not any(shutil.which(program, path=path) for program in programs)
    ]
    if missing:
        said = f"DeepSpeed's CPU collective has to be compiled without {' and '.join(missing)}"
        return Finding(FAIL, said, "apt-get install g++; pip install ninja")
    return Finding(OK, "DeepSpeed's CPU collective will be compiled at the first start (a minute)")


RANK_CODE = """
import datetime, sys, torch, torch.distributed as dist
backend, rank, port = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if backend == "nccl":
    torch.cuda.set_device(rank)
dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2,
                        timeout=datetime.timedelta(seconds=60))
x = torch.ones(1000, device="cuda" if backend == "nccl" else "cpu") * (rank + 1)
dist.all_reduce(x)
assert x.sum().item() == 3000, x
dist.destroy_process_group()
"""


def communication(patient: Patient) -> Finding:
    """Two processes on this machine add their numbers: over gloo, and over NCCL with two GPUs."""
    backends = ["gloo", *(["nccl"] if len(gpu_names(patient.environ)) > 1 else [])]
    for backend in backends:
        said = two_processes(backend, patient.environ)
        if said:
            mend = "let processes connect on 127.0.0.1; GLOO_SOCKET_IFNAME=lo, NCCL_SOCKET_IFNAME"
            return Finding(FAIL, f"{backend} between two processes: {said}", mend)
    return Finding(OK, f"two processes agree over {' and '.join(backends)}")


def two_processes(backend: str, environ: Mapping[str, str]) -> str:
    """An all-reduce of two new processes; what went wrong, or nothing."""
    port = str(free_port())
    words = [sys.executable, "-c", RANK_CODE, backend]
    ranks = [
        subprocess.Popen(
            [*words, str(rank), port],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=dict(environ),
        )
        for rank in range(2)
    ]
    said = ""
    try:
        for rank in ranks:
            lines = rank.communicate(timeout=PROBE_TIMEOUT_S)[1].strip().splitlines()
            if rank.returncode:
                said = said or (lines[-1][:200] if lines else f"status {rank.returncode}")
    except subprocess.TimeoutExpired:
        said = f"no answer within {PROBE_TIMEOUT_S} s"
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
                rank.communicate()
    return said


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return int(trial.getsockname()[1])


def ports(patient: Patient) -> Finding:
    """The port at which the processes meet."""
    wanted = int(patient.environ.get("MASTER_PORT") or DEFAULT_PORT)
    try:
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind(("", wanted))
    except OSError as error:
        mend = "another run uses it; give the launcher another --master_port"
        return Finding(WARN, f"port {wanted} cannot be opened ({error.strerror})", mend)
    return Finding(OK, f"port {wanted} is free")


def shared_memory(patient: Patient) -> Finding:
    """Where loader workers and processes of one node hand tensors over."""
    place = Path("/dev/shm")
    if not place.is_dir():
        return Finding(WARN, "/dev/shm does not exist", "mount a tmpfs there")
    free = shutil.disk_usage(place).free
    said = f"{free / GIB:.1f} GiB free in /dev/shm"
    mend = "in a container: --shm-size 8g, or --ipc host"
    if free < 16 * 2**20:
        return Finding(FAIL, said, mend)
    return Finding(WARN, said, mend) if free < GIB else Finding(OK, said)


def open_files(patient: Patient) -> Finding:
    """How many files a process may hold open: loader workers hold many."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    many = limit == resource.RLIM_INFINITY or limit >= 4096
    said = "open files: no limit" if limit == resource.RLIM_INFINITY else f"open files: {limit}"
    if many:
        return Finding(OK, said)
    return Finding(FAIL if limit < 256 else WARN, said, "ulimit -n 65536 before the start")


def write_rights(patient: Patient) -> Finding:
    """The folders that a run writes to."""
    cache = patient.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    places = {
        "--output_dir": Path(patient.output_dir or "runs"),
        "the Hugging Face cache (HF_HOME)": Path(cache),
        "TMPDIR": Path(patient.environ.get("TMPDIR") or "/tmp"),
    }
    wrong = [f"{name} {str(place)!r}" for name, place in places.items() if not can_write(place)]
    if wrong:
        mend = "name folders that you may write to, or free some space there"
        return Finding(FAIL, f"cannot write to {', '.join(wrong)}", mend)
    return Finding(OK, f"can write to {', '.join(places)}")


def existing(place: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    place = place.expanduser().absolute()
    return next((folder for folder in (place, *place.parents) if folder.exists()), Path("/"))


def can_write(place: Path) -> bool:
    """Whether a file can be made there, or the folder itself."""
    try:
        with tempfile.NamedTemporaryFile(dir=existing(place)) as trial:
            trial.write(b"x")
            trial.flush()
    except OSError:
        return False
    return True


def clock_and_locale(patient: Patient) -> Finding:
    """A clock that is years behind breaks certificates; a locale without UTF-8 breaks names."""
    year = datetime.datetime.now(datetime.UTC).year
    if year < 2025:
        return Finding(FAIL, f"the clock says {year}", "set the clock; certificates are refused")
    encoding = locale.getpreferredencoding(False)
    if encoding.replace("-", "").lower() != "utf8":
        return Finding(WARN, f"the locale's encoding is {encoding}", "export LC_ALL=C.UTF-8")
    return Finding(OK, f"clock in {year}, {encoding}")


def hub_token(patient: Patient) -> Finding:
    """Whether there is a token; its value is never read out."""
    home = Path(patient.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface")
    if patient.environ.get("HF_TOKEN"):
        return Finding(OK, "HF_TOKEN is set")
    if (home / "token").is_file():
        return Finding(OK, "a token is stored in the Hugging Face cache")
    said = "no token of the Hugging Face Hub"
    if patient.pushes:
        return Finding(FAIL, f"{said}, and the run shall publish", "export HF_TOKEN=...")
    return Finding(OK, f"{said} (needed for --push_to_hub and private data only)")


def slurm(patient: Patient) -> Finding:
    """An allocation of several tasks needs `srun`, or one launcher a node."""
    environ = patient.environ
    if "SLURM_JOB_ID" not in environ:
        return Finding(OK, "not inside a Slurm job")
    tasks = environ.get("SLURM_STEP_NUM_TASKS") or environ.get("SLURM_NTASKS") or "1"
    said = f"job of {environ.get('SLURM_JOB_NUM_NODES', '1')} node(s), {tasks} task(s)"
    if tasks.isdigit() and int(tasks) > 1 and "SLURM_STEP_ID" not in environ:
        return Finding(WARN, f"{said}, outside of a step", "start with srun python launch/train.py")
    if "SLURM_STEP_ID" in environ and "SLURM_PROCID" not in environ:
        return Finding(FAIL, f"{said}, without SLURM_PROCID", "pass Slurm's variables on")
    return Finding(OK, said)
