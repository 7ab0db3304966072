"""The file that says what the tables of a patient data set hold (see `mm_moe.data.prepare.tables`).

YAML or JSON, an object with these keys; unknown ones are errors, so that nothing is overlooked:

    patient: subject_id          # names the patient, in every table
    row: stay_id                 # names a row, where a patient has several (default: the patient)
    license: ...                 # optional
    label:
      file: outcomes.csv         # .csv, .csv.gz or .parquet, one line per row
      column: died
      kind: binary               # binary, classes, regression or survival
      classes: ["0", "1"]        # of binary and classes: how the cells spell them
      time: days                 # of survival, whose column holds 1 for an event, 0 for censored
    split:
      column: split              # of the label's file, cells train, validation or test; or
      shares: {train: 0.7, validation: 0.15, test: 0.15}      # by a keyed hash of the patient
      seed: 0
    prediction_time: 48          # the last hour that a model may see; or {column: hour} of the
                                 # label's file, for each row its own
    late: refuse                 # what comes after it: refuse (an error), or cut (and count)
    leaks: {sofa: a score that was given later}    # columns that must never be inputs
    modalities:
      static: {file: static.parquet, kind: table, columns: {age: numeric, unit: categorical}}
      labs:   {file: labs.csv, kind: events, time: hour, variable: test, value: result}
      vitals: {file: wide.csv, kind: events, time: hour, columns: [heart_rate, pressure]}
      notes:  {file: notes.csv, kind: text, column: text, time: hour}
      scan:   {file: scans.csv, kind: array, column: path, form: volume}      # .npy files
      photo:  {file: photos.csv, kind: image, column: path}

`form` is volume, dosages or table. `time` is in hours since the start of the row; every kind but
events can do without it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mm_moe.data.prepare.raw import SPLITS
from mm_moe.data.standardise import CATEGORICAL, NUMERIC
from mm_moe.errors import DataError
from mm_moe.registry import nearest

NAMES = ("schema.yaml", "schema.yml", "schema.json")
TOP = {"patient", "label", "split", "modalities"}
OPTIONAL = {"row", "license", "prediction_time", "late", "leaks"}
LABEL_KINDS = ("binary", "classes", "regression", "survival")
NEEDED = {  # kind -> keys that it must have, besides file
    "table": {"columns"},
    "events": {"time"},
    "text": {"column"},
    "array": {"column"},
    "image": {"column"},
}
ALLOWED = {
    "table": {"time"},
    "events": {"variable", "value", "columns"},
    "text": {"time"},
    "array": {"time", "form"},
    "image": {"time"},
}
FORMS = ("volume", "dosages", "table")
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")  # of a modality: parts of a model are called by it
TAKEN = ("id", "group", "label", "mask_key")  # columns that every prepared data set has


def read_schema(source: Path, name: str | None = None) -> tuple[Path, dict[str, Any]]:
    """The file and its checked content.

    Raises:
        DataError: it is not there, or says something that cannot be; names the entry.
    """
    wanted = [name] if name else list(NAMES)
    path = next((source / n for n in wanted if (source / n).is_file()), None)
    if path is None:
        raise DataError(
            f"{str(source)!r} has no {' or '.join(wanted)}, the file that says what its tables "
            "hold; see the docstring of mm_moe.data.prepare.tables_schema."
        )
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise DataError(f"{path} is no YAML or JSON: {type(error).__name__}.") from error
    _object(found, str(path))
    _keys(found, str(path), needed=TOP, allowed=OPTIONAL)
    for key in ("patient", *(["row"] if "row" in found else [])):
        _text(found[key], f"{path}: {key}")
    _label(found["label"], f"{path}: label")
    _split(found["split"], f"{path}: split")
    if found.get("late", "refuse") not in ("refuse", "cut"):
        raise DataError(f"{path}: late is {found['late']!r}; take refuse or cut.")
    _prediction_time(found.get("prediction_time"), f"{path}: prediction_time")
    leaks = found.setdefault("leaks", {})
    if isinstance(leaks, list):
        found["leaks"] = dict.fromkeys(map(str, leaks), "named as a leak")
    elif not isinstance(leaks, dict):
        raise DataError(f"{path}: leaks must be a list of columns, or {{column: reason}}.")
    _modalities(found, path)
    return path, found


def _prediction_time(about: Any, where: str) -> None:
    if isinstance(about, dict):
        _keys(about, where, needed={"column"}, allowed=set())
        _text(about["column"], f"{where}: column")
    elif about is not None and not _is_number(about):
        raise DataError(f"{where} is {about!r}; give a number of hours, or {{column: NAME}}.")


def _is_number(value: Any) -> bool:
    right = isinstance(value, int | float) and not isinstance(value, bool)
    return right and math.isfinite(value)


def _label(about: Any, where: str) -> None:
    _object(about, where)
    _keys(about, where, needed={"file", "column", "kind"}, allowed={"classes", "time"})
    for key in {"file", "column", "time"} & set(about):
        _text(about[key], f"{where}: {key}")
    if ("time" in about) != (about["kind"] == "survival"):
        raise DataError(f"{where}: time is needed for survival, and for nothing else.")
    if about["kind"] not in LABEL_KINDS:
        raise DataError(
            f"{where}: kind {about['kind']!r}; {nearest(str(about['kind']), [*LABEL_KINDS])}"
        )
    classes = about.get("classes")
    if about["kind"] in ("regression", "survival"):
        if classes is not None:
            raise DataError(f"{where}: {about['kind']} has no classes.")
        return
    if not isinstance(classes, list) or len(set(map(str, classes))) != len(classes):
        raise DataError(f"{where}: classes must be a list of different names.")
    if len(classes) < 2 or (about["kind"] == "binary" and len(classes) != 2):
        raise DataError(
            f"{where}: {about['kind']} with {len(classes)} classes; binary has two, the one to "
            "find last."
        )
    about["classes"] = list(map(str, classes))


def _split(about: Any, where: str) -> None:
    _object(about, where)
    _keys(about, where, needed=set(), allowed={"column", "shares", "seed"})
    if ("column" in about) == ("shares" in about):
        raise DataError(f"{where} must have one of column and shares.")
    if not isinstance(about.get("seed", 0), int):
        raise DataError(f"{where}: seed is {about['seed']!r}; give a whole number.")
    shares = about.get("shares")
    if shares is None:
        _text(about["column"], f"{where}: column")
        return
    good = isinstance(shares, dict) and set(shares) <= set(SPLITS) and "train" in shares
    values = list(shares.values()) if good else []
    if not good or not all(_is_number(v) and v > 0 for v in values):
        raise DataError(f"{where}: shares must give numbers above 0 to train, validation, test.")
    if abs(sum(values) - 1) > 1e-6:
        raise DataError(f"{where}: shares add up to {sum(values):g}, not 1.")


def _modalities(found: dict[str, Any], path: Path) -> None:
    _object(found["modalities"], f"{path}: modalities")
    if not found["modalities"]:
        raise DataError(f"{path}: modalities is empty; name at least one.")
    for name, about in found["modalities"].items():
        where = f"{path}: modality {name!r}"
        if not isinstance(name, str) or not NAME.fullmatch(name) or name in TAKEN:
            raise DataError(
                f"{where} must have a name of letters, digits and _, none of {', '.join(TAKEN)}."
            )
        _object(about, where)
        kind = about.get("kind")
        if not isinstance(kind, str) or kind not in NEEDED:
            raise DataError(f"{where}: kind {kind!r}; {nearest(str(kind), list(NEEDED))}")
        needed = NEEDED[kind] | {"file", "kind"}
        _keys(about, where, needed=needed, allowed=ALLOWED.get(kind, set()))
        _check_kind(about, where)
        for column in _inputs(about):
            if column in _telling(found, about["file"]):
                raise DataError(
                    f"{where} has {column!r} among its inputs, which names the row, its label or "
                    "its split; leave it out."
                )
        leaking = sorted(set(_inputs(about)) & set(found["leaks"]))
        if leaking:
            raise DataError(
                f"{where} has {leaking[0]!r} among its inputs, which leaks says must not be one: "
                f"{found['leaks'][leaking[0]]}."
            )


def _telling(found: Mapping[str, Any], file: str) -> set[str]:
    """The columns of a file that say who a row is, and in the label's file what it must not."""
    keys = {found["patient"], found.get("row", found["patient"])}
    label, split = found["label"], found["split"]
    if Path(file) != Path(label["file"]):
        return keys
    return keys | {label["column"], label.get("time"), split.get("column")}


def _check_kind(about: Mapping[str, Any], where: str) -> None:
    for key in {"file", "column", "time", "variable", "value"} & set(about):
        _text(about[key], f"{where}: {key}")
    if about["kind"] == "table":
        _object(about["columns"], f"{where}: columns")
        if not about["columns"] or not all(isinstance(name, str) for name in about["columns"]):
            raise DataError(f"{where}: columns must give a kind to at least one column's name.")
        for column, kind in about["columns"].items():
            if kind not in (NUMERIC, CATEGORICAL):
                words = nearest(str(kind), [NUMERIC, CATEGORICAL])
                raise DataError(f"{where}: column {column!r} is {kind!r}; {words}")
    elif about["kind"] == "events":
        long = {"variable", "value"} <= set(about)
        if long == ("columns" in about) or (not long and {"variable", "value"} & set(about)):
            raise DataError(f"{where} must have either variable and value, or columns.")
        if not long and not _different_names(about["columns"]):
            raise DataError(f"{where}: columns must be a list of different columns with numbers.")
    elif about.get("form", FORMS[0]) not in FORMS:
        raise DataError(f"{where}: form {about['form']!r}; {nearest(str(about['form']), [*FORMS])}")


def _different_names(columns: Any) -> bool:
    """Whether this is a list of at least one name, none of them twice."""
    named = isinstance(columns, list) and all(isinstance(name, str) for name in columns)
    return named and 0 < len(columns) == len(set(columns))


def _inputs(about: Mapping[str, Any]) -> list[str]:
    """The columns whose cells a model sees."""
    single = [about[key] for key in ("column", "value") if key in about]
    return [*single, *about.get("columns", [])]


def _object(value: Any, where: str) -> None:
    if not isinstance(value, dict):
        raise DataError(f"{where} holds a {type(value).__name__}; it should be an object.")


def _text(value: Any, where: str) -> None:
    if not isinstance(value, str) or not value:
        raise DataError(f"{where} must be a name, not {value!r}.")


def _keys(about: Mapping[str, Any], where: str, *, needed: set[str], allowed: set[str]) -> None:
    lacking = sorted(needed - set(about))
    if lacking:
        raise DataError(f"{where} lacks {', '.join(lacking)}.")
    for key in about:
        if key not in needed | allowed:
            raise DataError(
                f"{where}: unknown key {key!r}; {nearest(str(key), sorted(needed | allowed))}"
            )
