"""A real Slurm of two virtual nodes on this machine, in a folder and on ports of its own."""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
PROGRAMS = (*DAEMONS, "sbatch", "srun", "scontrol")
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
SchedulerType=sched/builtin
MpiDefault=none
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=debug Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> str | None:
    """Why there can be no cluster here; None where there can."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if not absent:
        return None
    return f"no {', '.join(absent)}; on Debian: apt-get install slurm-wlm munge"


def wait_until(what: str, holds: Callable[[], bool], *, timeout_s: float) -> None:
    """Wait for a condition, and say which one never came."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.1)


def ask(*command: str) -> str:
    """What a Slurm command prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.stdout if done.returncode == 0 else ""


def job(number: str, field: str) -> str:
    """A field of `scontrol show job`."""
    found = re.search(rf"\b{field}=(\S+)", ask("scontrol", "show", "job", number))
    return found[1] if found else ""


def start_again_now(number: str, *, restarts: int, log: Path) -> None:
    """Wait until a job is back in the queue and end the two minutes that Slurm lets it wait there.

    Args:
        number: of the job.
        restarts: how often it has then been started again.
        log: its log, in which every start says so.
    """
    queued = str(restarts)
    wait_until("requeued", lambda: job(number, "Restarts") == queued, timeout_s=240)

    def started() -> bool:
        ask("scontrol", "update", f"JobId={number}", "StartTime=now")  # refused while it ends
        return f"start {restarts + 1}: on " in log.read_text()

    wait_until("started again", started, timeout_s=120)


def wait_for_end(number: str, *, timeout_s: float) -> str:
    """Wait until a job is over; its state."""
    over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
    wait_until(f"job {number} over", lambda: job(number, "JobState") in over, timeout_s=timeout_s)
    return job(number, "JobState")


@contextlib.contextmanager
def cluster() -> Iterator[Path]:
    """The path of a running cluster's configuration; its daemons end with the block."""
    folder = Path(tempfile.mkdtemp(prefix="mm_moe_slurm_"))
    folder.chmod(0o755)
    conf, daemons = _write_files(folder), []
    environ = os.environ | {"SLURM_CONF": str(conf), "PATH": f"{os.environ['PATH']}:/usr/sbin"}
    munge = folder / "munge"
    commands = [
        [
            *("munged", "--foreground", "--force", f"--socket={munge}/socket"),
            *(f"--key-file={munge}/key", f"--pid-file={munge}/pid"),
            *(f"--seed-file={munge}/seed", f"--log-file={munge}/log"),
        ],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", "node1"],
        ["slurmd", "-D", "-N", "node2"],
    ]
    try:
        for command in commands:
            with (folder / "daemons.log").open("ab") as log:
                daemons.append(subprocess.Popen(command, env=environ, stdout=log, stderr=log))
            if command[0] == "munged":
                wait_until("munged", (munge / "socket").exists, timeout_s=30)
        wait_until("two idle nodes", lambda: _idle_nodes(conf) == 2, timeout_s=60)
        yield conf
    except BaseException as error:
        for log in sorted(folder.glob("*.log")):
            error.add_note(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}")
        raise
    finally:
        _stop(daemons, conf)
        shutil.rmtree(folder, ignore_errors=True)


def _write_files(folder: Path) -> Path:
    for name in ("munge", "state", "spool.node1", "spool.node2"):
        (folder / name).mkdir(mode=0o700 if name == "munge" else 0o755)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    host = socket.gethostname().split(".")[0]
    conf = folder / "slurm.conf"
    conf.write_text(
        CONFIG.format(host=host, user=getpass.getuser(), folder=folder, ports=_free_ports(3))
    )
    return conf


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def _idle_nodes(conf: Path) -> int:
    done = subprocess.run(
        ["sinfo", "-h", "-N", "-t", "idle", "-o", "%N"],
        env=os.environ | {"SLURM_CONF": str(conf)},
        capture_output=True,
        text=True,
        check=False,
    )
    return len(done.stdout.split())


def _stop(daemons: list[subprocess.Popen[bytes]], conf: Path) -> None:
    """End the jobs, then the daemons that were started here, the last one first."""
    environ = os.environ | {"SLURM_CONF": str(conf)}
    with contextlib.suppress(subprocess.SubprocessError, OSError):
        subprocess.run(["scancel", "--partition=debug"], env=environ, check=False, timeout=20)
        deadline = time.monotonic() + 45  # Slurm gives a cancelled process 30 seconds
        while time.monotonic() < deadline:
            left = subprocess.run(
                ["squeue", "-h"], env=environ, capture_output=True, check=False, timeout=20
            )
            if not left.stdout.strip():
                break
            time.sleep(0.2)
    for daemon in reversed(daemons):
        daemon.terminate()
        try:
            daemon.wait(timeout=20)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
