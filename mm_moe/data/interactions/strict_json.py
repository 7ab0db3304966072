"""JSON files of others, read strictly: an error tells file, line, key and rule.

Nothing but JSON is read, no key may occur twice, and no number may be infinite or NaN.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from mm_moe.errors import DataError

WORDS = {"no": 0, "yes": 1, "false": 0, "true": 1}  # labels that some files write as words


@dataclass(frozen=True)
class Entry:
    """One record and where it stands.

    Attributes:
        path: of the file.
        line: from 1; None: found only when needed (see `refuse`).
        name: the record's key in a file that is one object, otherwise its id if known.
        value: the parsed record.
    """

    path: Path
    line: int | None
    name: str
    value: Any

    def refuse(self, key: str | None, rule: str) -> NoReturn:
        """Raise the error for a key of this record.

        Raises:
            DataError: always.
        """
        line = self.line or line_of(self.path, self.name)
        where = f"line {line}, " if line else ""
        what = f"key {key!r}" if key else "the record"
        raise DataError(f"{self.path}: {where}id {self.name!r}: {what} {rule}.")

    def need(self, key: str) -> Any:
        """The value under a key.

        Raises:
            DataError: the record is no object, or lacks the key.
        """
        if not isinstance(self.value, dict):
            self.refuse(None, f"must be an object, is {_kind(self.value)}")
        if key not in self.value:
            self.refuse(key, f"is missing; the record has {', '.join(map(repr, self.value))}")
        return self.value[key]

    def number(self, key: str, value: Any) -> float:
        """A finite number.

        Raises:
            DataError: it is none.
        """
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.refuse(key, f"must be a number, is {_kind(value)}")
        try:
            found = float(value)
        except OverflowError:
            self.refuse(key, "must be finite, is a whole number beyond any float")
        if not math.isfinite(found):
            self.refuse(key, f"must be finite, is {value}")
        return found

    def numbers(self, key: str, value: Any, *, counts: tuple[int, ...]) -> list[float]:
        """A list of finite numbers of one of the given lengths.

        Raises:
            DataError: it is none.
        """
        if not isinstance(value, list) or len(value) not in counts:
            size = f" of {len(value)}" if isinstance(value, list) else ""
            wanted = " or ".join(map(str, counts))
            self.refuse(key, f"must be a list of {wanted} numbers, is {_kind(value)}{size}")
        return [self.number(key, entry) for entry in value]

    def label(self, key: str, value: Any, *, num_labels: int = 2) -> int:
        """A class index, written as a whole number, a truth value, or a word for one of these.

        Raises:
            DataError: it is none, or outside the classes.
        """
        found = WORDS.get(value.strip().lower(), value) if isinstance(value, str) else value
        if isinstance(found, str) and found.strip().isdecimal():
            found = int(found)
        if isinstance(found, float) and found.is_integer():
            found = int(found)
        if not isinstance(found, int) or not 0 <= found < num_labels:
            self.refuse(key, f"must be a class from 0 to {num_labels - 1}, is {value!r}")
        return int(found)


def read_text(path: Path) -> str:
    """The text of a file.

    Raises:
        DataError: it is not there, or no UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise DataError(f"{path} is not there.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {type(error).__name__}.") from error


def parse(text: str, *, path: Path, line: int | None = None) -> Any:
    """One JSON value; `line` is where it stands in a file of JSON lines.

    Raises:
        DataError: it does not parse, has a key twice, or a constant that JSON does not know.
    """

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(found)
        if len(value) < len(found):
            names = [name for name, _ in found]
            twice = next(name for name in value if names.count(name) > 1)
            place = f"line {line}, " if line else ""
            raise DataError(f"{path}: {place}key {twice!r} occurs twice in one object.")
        return value

    try:
        return json.loads(text, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        at = line or error.lineno
        raise DataError(
            f"{path}: line {at}, column {error.colno}: not valid JSON: {error.msg}."
        ) from error
    except ValueError as error:  # what int refuses: thousands of digits
        place = f"line {line}, " if line else ""
        raise DataError(
            f"{path}: {place}not readable as JSON: a number of too many digits."
        ) from error
    except RecursionError as error:
        raise DataError(f"{path}: nested too deep.") from error


def read_records(path: Path) -> Iterator[Entry]:
    """The records of a file that is one object, id -> record.

    Raises:
        DataError: it does not parse, is no object, or is empty.
    """
    value = parse(read_text(path), path=path)
    if not isinstance(value, dict):
        raise DataError(f"{path}: the file must hold one object id -> record, is {_kind(value)}.")
    if not value:
        raise DataError(f"{path}: the file holds no record.")
    for name, record in value.items():
        yield Entry(path, None, name, record)


def read_lines(path: Path, *, id_key: str) -> Iterator[Entry]:
    """The records of a file of JSON lines, named by their ids; empty lines are passed over.

    Raises:
        DataError: a line does not parse or has no id, or there is no line.
    """
    empty = True
    for number, text in enumerate(read_text(path).split("\n"), start=1):
        if not text.strip():
            continue
        empty = False
        entry = Entry(path, number, "?", parse(text, path=path, line=number))
        name = entry.need(id_key)
        if isinstance(name, bool) or not isinstance(name, str | int) or name == "":
            entry.refuse(id_key, f"must be a text or a whole number, is {name!r}")
        yield Entry(path, number, str(name), entry.value)
    if empty:
        raise DataError(f"{path}: the file holds no record.")


def line_of(path: Path, name: str) -> int | None:
    """The line on which a key first stands, for a message; None if it cannot be told."""
    text = read_text(path)
    spellings = (json.dumps(name), json.dumps(name, ensure_ascii=False))
    places = [place for form in spellings if (place := text.find(form)) >= 0]
    return text.count("\n", 0, min(places)) + 1 if places else None


def write_records(path: Path, records: dict[str, Any]) -> None:
    """Write one object id -> record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(records, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "a truth value"}
    return "null" if value is None else names.get(type(value), "a number")
