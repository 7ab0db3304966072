"""Where a run is pushed: the flags, refused before training where they cannot work."""

from __future__ import annotations

import argparse
import logging
import sys

from huggingface_hub.utils import get_token

from launch.finish import without_secrets
from mm_moe.checkpoint import hub
from mm_moe.checkpoint.hub import HubTarget
from mm_moe.errors import ConfigError
from mm_moe.models.shards import check_size
from mm_moe.training import runtime

logger = logging.getLogger("mm_moe")
STRATEGIES = ("end", "every_save", "checkpoint")
HOW_TO_LOG_IN = (
    "set HF_TOKEN to a token that may write there (or log in with `hf auth login`); a token on the "
    "command line (--hub_token) is seen by everyone who can list the processes"
)


def check_hub_flags(values: argparse.Namespace) -> None:
    """Refuse flags that no push can honour.

    Raises:
        ConfigError: names the flag and what to do instead.
    """
    values.max_shard_size = check_size("max_shard_size", values.max_shard_size)
    if not values.hub_timeout_s > 0:
        raise ConfigError(f"--hub_timeout_s {values.hub_timeout_s} must be above 0 seconds.")
    if not values.push_to_hub:
        return
    if not values.hub_model_id:
        raise ConfigError("--push_to_hub needs --hub_model_id ORG/NAME.")
    hub.check_repo_id(values.hub_model_id)
    strategy = getattr(values.hub_strategy, "value", values.hub_strategy)
    if strategy not in STRATEGIES:
        raise ConfigError(
            f"--hub_strategy {strategy} is not supported: while one checkpoint is uploaded the "
            f"next ones replace each other, so not all would arrive. Take {', '.join(STRATEGIES)}."
        )
    if values.hub_always_push:
        raise ConfigError(
            "--hub_always_push is not supported: training never waits for the Hub, and the newest "
            "model wins. Leave it out."
        )
    values.hub_strategy = strategy


def hub_target(values: argparse.Namespace) -> HubTarget | None:
    """Where to push, if anywhere; takes the token out of the settings and of the command line.

    Raises:
        ConfigError: no token.
    """
    token, values.hub_token = values.hub_token, None
    sys.argv[1:] = without_secrets(sys.argv[1:])  # loggers of other libraries keep it
    wanted, values.push_to_hub = values.push_to_hub, False  # by our own hand
    if not wanted:
        return None
    token = (token or get_token() or "").strip()
    if not token:
        raise ConfigError(
            f"--push_to_hub: there is no token for {values.hub_model_id}; {HOW_TO_LOG_IN}."
        )
    return HubTarget(
        values.hub_model_id,
        token=token,
        private=values.hub_private_repo,
        revision=values.hub_revision,
        timeout_s=values.hub_timeout_s,
    )


def refuse_wrong_token(target: HubTarget) -> None:
    """Ask the Hub once, on rank 0, whose token it is; a Hub that is not there is only a warning.

    A collective. Takes 10 s at most, and the time that a process needs to start.

    Raises:
        ConfigError: on every rank: the Hub does not take the token.
    """
    access = runtime.agree(hub.check_token(target) if runtime.is_main() else None)
    if access.state == "refused":
        raise ConfigError(
            f"--push_to_hub {target.repo_id}: the Hub does not take this token ("
            f"{access.reason.split(';')[0]}); {HOW_TO_LOG_IN}, or leave --push_to_hub out."
        )
    if not runtime.is_main():
        return
    owner = target.repo_id.split("/")[0] if "/" in target.repo_id else ""
    if access.state == "unreachable":
        logger.warning(
            "warning: the Hub cannot be asked now (%s). Training goes on; the push is tried at its "
            "time, and %s says how it ended.",
            access.reason,
            "push.json",
        )
    elif owner and owner not in access.names:
        logger.warning(
            "warning: the token belongs to %s, which may not be able to write to %s.",
            ", ".join(access.names),
            owner,
        )


def token_for_export(given: str | None) -> str:
    """The token of `launch/export.py`.

    Raises:
        ConfigError: there is none.
    """
    token = (given or get_token() or "").strip()
    if not token:
        raise ConfigError(f"--push_to_hub: there is no token; {HOW_TO_LOG_IN}.")
    return token
