"""A signal that comes while the program still imports is acted on where the ranks agree."""

import os
import signal
import subprocess
import sys

import pytest

from mm_moe.errors import PreemptedError
from mm_moe.training.early_signals import PREEMPTING, EarlySignals
from mm_moe.training.preemption import StopSignals

# The real program, up to where torch would be imported: there the signal comes.
PROGRAM = """
import os, signal, sys
from launch import train

assert "torch" not in sys.modules
class Late:
    def __getattr__(self, name):
        os.kill(os.getpid(), signal.{name})
        return lambda main: print("goes on")
sys.modules["launch.cli"] = Late()
sys.argv = ["launch/train.py"]
train.program()
"""


@pytest.fixture
def given_back():
    """Leave the signals as they were."""
    before = {number: signal.getsignal(number) for number in PREEMPTING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_the_program_lives_on_through_a_signal_in_its_imports(name):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(name=name)], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "goes on\n"), done.stderr


def test_what_came_early_stops_the_run_at_its_first_agreement(given_back):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    early = EarlySignals().listen()
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert early.received == signal.SIGUSR1  # the first one
    with StopSignals(early) as signals, pytest.raises(PreemptedError, match="SIGUSR1, here"):
        signals.check(where="here")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # nobody notes it without effect


def test_no_early_signal_no_stop(given_back):
    with StopSignals(EarlySignals().listen()) as signals:
        signals.check(where="here")
    with StopSignals() as signals:
        signals.check(where="here")
