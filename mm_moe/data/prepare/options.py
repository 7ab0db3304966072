"""The options of a raw data set, checked before its adapter sees them."""

from __future__ import annotations

import inspect
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from mm_moe.errors import ConfigError
from mm_moe.registry import nearest

LARGEST = 2**53  # no count or seed is beyond it, and libraries take it
WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    types.NoneType: "null",
}


def check_options(adapter: type, options: Mapping[str, Any], *, name: str) -> None:
    """Compare options from a command line with the arguments that an adapter declares.

    Args:
        adapter: of a raw data set; its keyword arguments with their types are its options.
        options: as JSON gave them.
        name: of the data set, for messages.

    Raises:
        ConfigError: an option that the adapter does not have, or a value of another type.
    """
    parameters = inspect.signature(adapter).parameters.values()
    known = [one.name for one in parameters if one.kind is one.KEYWORD_ONLY]
    hints = typing.get_type_hints(adapter.__init__)  # type: ignore[misc]
    for option, value in options.items():
        if option not in known:
            words = nearest(option, known) if known else "it has no options."
            raise ConfigError(f"--options for {name!r}: unknown option {option!r}; {words}")
        wanted = typing.get_args(hints.get(option)) or (hints.get(option, object),)
        if not any(_is(value, kind) for kind in wanted):
            words = " or ".join(WORDS.get(kind, kind.__name__) for kind in wanted)
            raise ConfigError(f"--options for {name!r}: {option} is {value!r}; it takes {words}.")


def _is(value: Any, kind: type) -> bool:
    """Whether a JSON value is of a type; a whole number is a number, a truth value is none."""
    if kind in (int, float) and isinstance(value, int | float):
        fits = not isinstance(value, bool) and (kind is float or isinstance(value, int))
        return fits and math.isfinite(value) and abs(value) <= LARGEST
    return isinstance(value, kind)
