"""Your own data: image folders, CSV, JSON lines, Parquet or the Hub, by column names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets

from mm_moe.batch import IMAGE, TEXT, Sample
from mm_moe.data.captions import CaptionRule, caption_rule
from mm_moe.data.locate import Located, locate
from mm_moe.data.reading import file_sha256, image_payload, reading
from mm_moe.data.remote_tables import RemoteTables, beside, locate_remote
from mm_moe.data.retrying import Remote
from mm_moe.data.schema import (
    MULTI_LABEL,
    NO_LABEL,
    PROBLEM_TYPES,
    REGRESSION,
    SINGLE_LABEL,
    SURVIVAL,
    TASKS,
    DataSource,
    check_label,
    label_index,
    nearest_type,
)
from mm_moe.data.web import is_http, shown_url
from mm_moe.errors import ConfigError, DataError

FOLDER = "__folder__"  # column that we add: the folder that relative image paths start from
MAX_CLASSES = 10_000
MAX_SHOWN = 40  # columns that a message lists


class ColumnsData(DataSource):
    """Image-text data by column names.

    Args:
        data_dir: a folder, a table file, the name of a data set on the Hub ("owner/name"), or the
            http(s) address of a table or of a folder of tables, whose files `train`, `validation`
            and `test` then name ("train-{000..011}.parquet").
        image_column: column with images (encoded, or paths relative to the table's folder).
        text_column: column with text; several, or {column: weight}, where each epoch of training
            shall choose one of them (evaluation takes the first). A list in a cell is chosen from
            in the same way.
        label_column: column with the class name or number (a list of names for several classes, a
            number for regression); an empty cell means that the label is not known.
        id_column: column with a stable unique id. Without it an image folder's ids are its paths,
            others are hashes of the row's content (equal rows then share one).
        train: split name, or file pattern relative to the folder; so are `validation` and `test`.
        validation: see `train`.
        test: see `train`.
        label_names: class names; by default those that the data declare, else all that occur in the
            train split, sorted.
        problem_type: single-label classification by default where there is a label column.
        task: family of scores, such as "binary" for the AUROC of the second class; by default that
            of the problem type.
        config: configuration of a Hub data set.
        revision: revision of a Hub data set.
        name: key of masks; by default "columns/" and the last part of `data_dir`.
        license: who may do what with the data, for the model card.
        caption_templates: texts with `{}` around the caption, chosen like captions.
        join_texts: what stands between the texts of a list, where they are keywords that belong
            together and not captions to choose from.
        stream_retries: further tries of a request that fails, for addresses.
        stream_timeout_s: what a request may take, see `mm_moe.data.retrying.Remote`.

    Raises:
        ConfigError: options that do not fit together.
        DataError: no such data, split, or column.
    """

    def __init__(
        self,
        data_dir: str | None = None,
        *,
        image_column: str | None = None,
        text_column: str | Sequence[str] | Mapping[str, float] | None = None,
        label_column: str | None = None,
        id_column: str | None = None,
        train: str | None = None,
        validation: str | None = None,
        test: str | None = None,
        label_names: Sequence[str] | None = None,
        problem_type: str | None = None,
        config: str | None = None,
        revision: str | None = None,
        task: str | None = None,
        name: str | None = None,
        license: str = "not stated",
        caption_templates: Sequence[str] | None = None,
        join_texts: str | None = None,
        stream_retries: int = 8,
        stream_timeout_s: float = 60.0,
    ) -> None:
        super().__init__(None if is_http(data_dir) else data_dir)
        if data_dir is None:
            raise ConfigError("data set 'columns' needs data_dir: a folder, a file, or a Hub name.")
        if not image_column and not text_column:
            raise ConfigError("name at least one of image_column and text_column.")
        self._image: str | None = image_column or None
        self._captions: CaptionRule | None = None
        if text_column:
            self._captions = caption_rule(text_column, templates=caption_templates, join=join_texts)
        self._columns = [*filter(None, [image_column]), *self._text_columns]
        self.modalities = (IMAGE,) * bool(image_column) + (TEXT,) * bool(text_column)
        self.label_column, self.id_column = label_column, id_column
        self.problem_type = problem_type or (SINGLE_LABEL if label_column else NO_LABEL)
        self._check_problem(task)
        self.task = task
        self.license = license
        self.name = name or f"columns/{Path(shown_url(data_dir)).name}"
        self.remote = Remote(retries=stream_retries, timeout_s=stream_timeout_s)
        self._given_names = None if label_names is None else tuple(label_names)
        wanted = {"train": train, "validation": validation, "test": test}
        self._located: Located | RemoteTables
        self._is_image_folder = False
        if is_http(data_dir):
            self._located = locate_remote(data_dir, wanted=wanted, remote=self.remote)
        else:
            self._located = locate(data_dir, wanted=wanted, config=config, revision=revision)
            self._is_image_folder = self._located.builder == "imagefolder"

    def _check_problem(self, task: str | None) -> None:
        if self.problem_type not in PROBLEM_TYPES:
            raise ConfigError(
                f"unknown problem_type {self.problem_type!r}; {nearest_type(self.problem_type)}"
            )
        if self.problem_type == SURVIVAL:
            raise ConfigError(
                f"a label column holds no pairs (time, event), as problem_type {SURVIVAL!r} needs "
                "them; prepare the data with launch/prepare_data.py tables."
            )
        if (self.problem_type == NO_LABEL) == bool(self.label_column):
            raise ConfigError(
                f"problem_type {self.problem_type!r} does not fit label_column "
                f"{self.label_column!r}."
            )
        if task is not None and TASKS.get(task) != self.problem_type:
            fitting = [name for name, kind in TASKS.items() if kind == self.problem_type]
            raise ConfigError(
                f"task {task!r} does not fit problem_type {self.problem_type!r}; take one of "
                f"{', '.join(fitting)}."
            )

    @property
    def _text_columns(self) -> tuple[str, ...]:
        return tuple(self._captions.columns) if self._captions else ()

    def splits(self) -> tuple[str, ...]:
        """The splits that were found, in our names."""
        return self._located.splits

    def stream(self, split: str) -> datasets.IterableDataset:
        """The named columns of a split.

        Raises:
            DataError: no such split (those that exist are listed) or column (likewise).
        """
        label = [self.label_column] if self.label_column else []
        identity = [self.id_column] if self.id_column else []
        stream = self._open(split, [*self._columns, *label, *identity])
        if self._located.files.get(split) and self._image:
            folder = self._located.folder(split)
            stream = stream.map(_add_folder, fn_kwargs={"folder": folder})
        return stream

    def _open(self, split: str, columns: Iterable[str]) -> datasets.IterableDataset:
        self.check_split(split)
        with reading(f"split {split!r} of {self.name!r}"):
            known = self._located.columns(split)
        for column in columns:
            if column not in known:
                shown = ", ".join(known[:MAX_SHOWN]) + (", ..." if len(known) > MAX_SHOWN else "")
                raise DataError(
                    f"split {split!r} of {self.name!r} has no column {column!r}; it has: {shown}."
                )
        with reading(f"split {split!r} of {self.name!r}"):
            return self._located.stream(split, list(dict.fromkeys(columns)))

    @cached_property
    def label_names(self) -> tuple[str, ...]:  # type: ignore[override]
        """Class names: given, declared by the data, or found in the train split."""
        if self.problem_type not in (SINGLE_LABEL, MULTI_LABEL):
            return ()
        return self._given_names or self._declared_names or self._found_names()

    @cached_property
    def _declared_names(self) -> tuple[str, ...] | None:
        """Names of a ClassLabel feature; its cells hold indices into them."""
        with reading(f"split 'train' of {self.name!r}"):
            return self._located.class_names("train", str(self.label_column))

    def _found_names(self) -> tuple[str, ...]:
        """All class names of the train split: one pass over its label column."""
        names: set[str] = set()
        with reading(f"split 'train' of {self.name!r}"):
            for columns in self._open("train", [str(self.label_column)]).iter(batch_size=1000):
                for cell in columns[str(self.label_column)]:
                    names.update(self._cell_names(cell))
                if len(names) > MAX_CLASSES:
                    raise DataError(
                        f"column {self.label_column!r} has over {MAX_CLASSES:,} different values; "
                        "is it the label? For a number to predict set problem_type=regression."
                    )
        if not names:
            raise DataError(f"column {self.label_column!r} of the train split has no label.")
        numeric = all(name.lstrip("-").isdigit() for name in names)
        return tuple(sorted(names, key=int if numeric else str))

    def _cell_names(self, cell: Any) -> list[str]:
        """The class names in a label cell: none, one, or several."""
        if isinstance(cell, list) != (self.problem_type == MULTI_LABEL) and cell is not None:
            raise DataError(
                f"column {self.label_column!r} holds {type(cell).__name__} values, which does not "
                f"fit problem_type {self.problem_type}; lists are for {MULTI_LABEL}."
            )
        cells = cell if isinstance(cell, list) else [cell]
        return [name for name in map(_class_name, cells) if name]

    def to_sample(self, row: dict[str, Any]) -> Sample:
        """The named cells as a sample."""
        cells: dict[str, Any] = {}
        if self._image:
            cells[IMAGE] = image_payload(row.get(self._image))
        if self._captions:
            cells[TEXT] = self._captions.payload(row)
        sample_id = self._id(row, cells)
        image = cells.get(IMAGE)
        if isinstance(image, str) and FOLDER in row and "://" not in image:
            cells[IMAGE] = beside(row[FOLDER], image)
        payload = {modality: value for modality, value in cells.items() if value}
        return Sample(sample_id, payload, self._label(row, sample_id))

    def _id(self, row: dict[str, Any], cells: dict[str, Any]) -> str:
        """The id column, an image folder's path, or a hash of the content."""
        if self.id_column:
            if row[self.id_column] is None:
                raise DataError(f"a row of {self.name!r} has an empty id ({self.id_column!r}).")
            return str(row[self.id_column])
        image = cells.get(IMAGE)
        if self._is_image_folder and isinstance(image, str):
            return Path(image).relative_to(self.data_dir.resolve()).as_posix()  # type: ignore[union-attr]
        digest = hashlib.blake2b(digest_size=12)
        label = row.get(self.label_column) if self.label_column else None
        for cell in (*cells.values(), label):
            part = cell if isinstance(cell, bytes) else json.dumps(cell, default=str).encode()
            digest.update(len(part).to_bytes(8, "big") + part)
        return digest.hexdigest()

    def _label(self, row: dict[str, Any], sample_id: str) -> Any:
        if self.label_column is None:
            return None
        cell = row[self.label_column]
        if self.problem_type == REGRESSION:
            label: Any = None if cell is None else _number(cell, sample_id=sample_id)
        elif self.problem_type == SINGLE_LABEL and self._declared_names:
            label = None if cell is None or cell == -1 else cell  # -1: the field's word for unknown
        else:
            label = self._named_label(cell, sample_id)
        check_label(
            label,
            problem_type=self.problem_type,
            num_labels=len(self.label_names),
            sample_id=sample_id,
        )
        return label

    def _named_label(self, cell: Any, sample_id: str) -> int | list[int] | None:
        names = self._cell_names(cell)
        found = [label_index(name, self.label_names, sample_id=sample_id) for name in names]
        if self.problem_type == SINGLE_LABEL:
            return found[0] if found else None
        if cell is None:
            return None
        return [int(index in found) for index in range(len(self.label_names))]

    def size(self, split: str) -> int | None:
        """Rows of a split, counted in one pass over local data; None where that is too much.

        That is so for the Hub, and for CSV and JSON lines at an address.
        """
        self.check_split(split)
        if isinstance(self._located, RemoteTables):
            with reading(f"data set {self.name!r}"):
                return self._located.size(split)
        return self._sizes[split] if self._located.is_local else None

    @cached_property
    def _sizes(self) -> dict[str, int]:
        column = self._columns[0]
        with reading(f"data set {self.name!r}"):
            return {split: self._count(split, column) for split in self.splits()}

    def _count(self, split: str, column: str) -> int:
        batches = self._open(split, [column]).iter(batch_size=1000)
        return sum(len(cells[column]) for cells in batches)

    def fingerprint(self) -> str:
        """sha256 over the tables' content; images beside them and in folders by name and size."""
        if isinstance(self._located, RemoteTables):
            return self._located.fingerprint()
        digest = hashlib.sha256()
        if not self._located.is_local:
            # Resolved files of the Hub carry the commit in their names.
            digest.update(json.dumps(self._located.reader.config.data_files, default=str).encode())
            return digest.hexdigest()
        tables = [file for files in self._located.files.values() for file in files]
        for file in tables:
            digest.update(f"{file.name} {file_sha256(file)}\n".encode())
        if not tables:
            root = Path(str(self.data_dir))
            for file in sorted(path for path in root.rglob("*") if path.is_file()):
                digest.update(f"{file.relative_to(root)} {file.stat().st_size}\n".encode())
        return digest.hexdigest()


def _add_folder(row: dict[str, Any], *, folder: str) -> dict[str, str]:
    return {FOLDER: folder}


def _class_name(cell: Any) -> str:
    """A label cell as a class name; "" where the label is not known."""
    if cell is None or cell != cell:  # NaN is the empty cell of a number column
        return ""
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))  # a column of integers with a gap is read as floats
    return str(cell).strip()


def _number(cell: Any, *, sample_id: str) -> float | None:
    """A regression target; an empty cell of a number column (NaN) is unknown."""
    try:
        value = float(cell)
    except (TypeError, ValueError):
        raise DataError(f"the label of sample {sample_id!r} is not a number.") from None
    return None if value != value else value
