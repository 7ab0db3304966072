"""What can be refused of the flags about signals and bad numbers, before anything is written."""

from __future__ import annotations

import argparse
import math

from mm_moe.errors import ConfigError


def check_faults(values: argparse.Namespace) -> None:
    """Refuse numbers that no run can have, and the library's own checkpoint on a signal.

    Raises:
        ConfigError: names flag, value and rule.
    """
    if values.max_bad_steps < 1:
        raise ConfigError(
            f"--max_bad_steps {values.max_bad_steps} must be at least 1: the skipped steps in a "
            "row with which a run stops."
        )
    if not 0 <= values.skip_spikes < math.inf:
        raise ConfigError(
            f"--skip_spikes {values.skip_spikes} must be a number from 0 (skip none), such as 6."
        )
    if 0 < values.skip_spikes < 3:
        raise ConfigError(
            f"--skip_spikes {values.skip_spikes} would skip ordinary steps (2.3% of them at 2 "
            "standard deviations); take 3 or more, such as 6."
        )
    if values.enable_jit_checkpoint:
        raise ConfigError(
            "--enable_jit_checkpoint is not supported: its ranks do not agree on a step. Leave it "
            "out; SIGTERM, SIGUSR1 and Ctrl-C always save here, on all processes at one step."
        )
