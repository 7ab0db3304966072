"""Errors that a user can act on: the command line prints their text and exits with their status.

Statuses of `launch/train.py`: 0 done, 2 refused, 75 preempted (saved; start again to go on, as
sysexits' EX_TEMPFAIL means), 16 numbers that stayed bad, 17 another process died or hung, 130
interrupted by hand.
"""

from typing import ClassVar

EXIT_REFUSED = 2
EXIT_BAD_NUMBERS = 16
EXIT_LOST_RANK = 17
EXIT_PREEMPTED = 75
EXIT_INTERRUPTED = 130


class MMMoEError(Exception):
    """Base of every expected failure: the message names the value, the rule and a way out.

    Attributes:
        exit_code: what a program that ends by this error returns to its caller.
        heading: the word before the text in the one line that the command line prints.
        every_rank: whether each process that meets it says so; else rank 0 speaks for all.
    """

    exit_code: ClassVar[int] = EXIT_REFUSED
    heading: ClassVar[str] = "error"
    every_rank: ClassVar[bool] = False


class ConfigError(MMMoEError):
    """A setting, flag or recipe that cannot work."""


class DataError(MMMoEError):
    """A data set, split, row or label that breaks its contract."""

    every_rank = True  # one rank may meet it alone


class ParallelismError(MMMoEError):
    """A layout of processes and experts that cannot work."""


class CheckpointError(MMMoEError):
    """A checkpoint that is missing, incomplete, damaged or of another run."""


class BadNumbersError(MMMoEError):
    """Losses or gradients that stayed bad for too many steps in a row."""

    exit_code = EXIT_BAD_NUMBERS


class StoppedError(MMMoEError):
    """A signal asked the run to stop, and all processes agreed on where it does."""

    heading = "stopped"


class PreemptedError(StoppedError):
    """Stopped by SIGTERM or SIGUSR1: the machine is wanted back, the run shall go on elsewhere."""

    exit_code = EXIT_PREEMPTED


class InterruptedRunError(StoppedError):
    """Stopped by hand (Ctrl-C)."""

    exit_code = EXIT_INTERRUPTED


class LostRankError(MMMoEError):
    """Another process of the run died, hangs, or never came."""

    exit_code = EXIT_LOST_RANK
    every_rank = True


class MemoryLimitError(MMMoEError):
    """A run that asks for more memory than there is."""

    every_rank = True
