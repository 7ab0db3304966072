"""Flags whose value is a JSON object."""

from __future__ import annotations

import json
from typing import Any

from mm_moe.errors import ConfigError


def parse_json(flag: str, text: str | None) -> dict[str, Any]:
    """Read a flag whose value is a JSON object.

    Raises:
        ConfigError: not JSON, or not an object; names the flag, line and column.
    """
    if not text:
        return {}
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"--{flag} is not valid JSON: {error.msg} at line {error.lineno}, "
            f"column {error.colno}; "
            f"write an object such as '{{\"name\": 1}}'."
        ) from error
    if not isinstance(value, dict):
        raise ConfigError(f"--{flag} must be a JSON object, got {type(value).__name__} {text!r}.")
    return value
