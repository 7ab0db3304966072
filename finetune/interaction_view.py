"""A data set as one interaction expert, or the fuser of several, sees it in training.

The paper's experts are copies of one model, each fine-tuned for one category of interaction (Yu et
al. 2024, MMoE): on its own rows alone, or on all rows with one class more for those of others. The
fuser has the categories as its labels. What is scored is never changed but for the fuser, whose
task the categories are; a category holds the label, so nothing of it is ever an input.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import datasets

from mm_moe.batch import Sample
from mm_moe.data.interactions.categories import COARSE, NONE
from mm_moe.data.interactions.table import InteractionTable, check_covers
from mm_moe.data.schema import SINGLE_LABEL, DataSource
from mm_moe.errors import ConfigError, DataError
from mm_moe.registry import nearest

REJECT = "another_category"  # the name of the class for rows of other experts


class InteractionView(DataSource):
    """A data set of which everything is as it was, to be narrowed by a subclass.

    Args:
        source: the data set, single-label.
        table: the categories of its rows; it must cover the training split.
        train_split: the split whose rows are chosen or labelled anew.

    Raises:
        ConfigError: another kind of task.
        DataError: the table lacks training rows, or is of another data set.
    """

    def __init__(self, source: DataSource, table: InteractionTable, *, train_split: str) -> None:
        super().__init__(None)
        self.data_dir, self.remote = source.data_dir, source.remote
        self.source, self.train_split = source, source.check_split(train_split)
        self.name, self.modalities = source.name, source.modalities
        self.label_names, self.license = tuple(source.label_names), source.license
        self.problem_type, self.task = source.problem_type, source.task
        self.unlabelled, self.sequences = dict(source.unlabelled), source.sequences
        if self.problem_type != SINGLE_LABEL:
            raise ConfigError(
                f"interaction experts need one class for each sample; {self.name!r} is "
                f"{self.problem_type}."
            )
        if table.dataset != self.name:
            raise DataError(
                f"the interaction table is of {table.dataset!r}, the data set is {self.name!r}; "
                f"make one with `launch/prepare_data.py interactions --dataset {self.name}`."
            )
        self.train_ids = tuple(sample.id for sample in source.index(train_split))
        check_covers(table, self.train_ids, split=train_split)

    def splits(self) -> tuple[str, ...]:
        """Those of the data set."""
        return self.source.splits()

    def stream(self, split: str) -> datasets.IterableDataset:
        """Those of the data set."""
        return self.source.stream(split)

    def to_sample(self, row: dict[str, Any]) -> Sample:
        """The data set's sample, its label changed where the view changes it."""
        return self.relabelled(self.source.to_sample(row))

    def index(self, split: str) -> Iterator[Sample]:
        """The data set's ids, with the labels of the view."""
        yield from map(self.relabelled, self.source.index(split))

    def relabelled(self, sample: Sample) -> Sample:
        """The sample as the view has it."""
        return sample

    def line(
        self, split: str, *, seed: int, shuffle_buffer: int, start: int
    ) -> Iterator[tuple[int, dict[str, Any]]] | None:
        """The data set's order."""
        return self.source.line(split, seed=seed, shuffle_buffer=shuffle_buffer, start=start)

    def size(self, split: str) -> int | None:
        """Rows of a split."""
        return self.source.size(split)

    def fingerprint(self) -> str:
        """That of the data set."""
        return self.source.fingerprint()


class SubsetView(InteractionView):
    """The training rows of one category alone; the other splits are whole.

    Args:
        source: see `InteractionView`.
        table: see `InteractionView`.
        train_split: see `InteractionView`.
        category: R, U, AS or DS, or U of certain modalities, such as "U_text".

    Raises:
        ConfigError: no such category.
        DataError: no training row has it.
    """

    def __init__(
        self, source: DataSource, table: InteractionTable, *, train_split: str, category: str
    ) -> None:
        super().__init__(source, table, train_split=train_split)
        if source.line(train_split, seed=0, shuffle_buffer=0, start=0) is not None:
            raise ConfigError(
                f"--interaction_subset {category} takes rows out of a data set, and "
                f"{source.name!r} draws its rows by weight; train on one of its parts."
            )
        self.own = own_ids(table, category, split=train_split) & set(self.train_ids)
        if not self.own:
            raise _no_row(table, category, split=train_split)

    def stream(self, split: str) -> datasets.IterableDataset:
        """The rows of a split; of the training split only those of the category."""
        stream = self.source.stream(split)
        return stream.filter(self._is_own) if split == self.train_split else stream

    def _is_own(self, row: dict[str, Any]) -> bool:
        return self.source.to_sample(row).id in self.own

    def index(self, split: str) -> Iterator[Sample]:
        """The samples that `stream` has."""
        for sample in self.source.index(split):
            if split != self.train_split or sample.id in self.own:
                yield sample

    def size(self, split: str) -> int | None:
        """Rows of a split."""
        if split != self.train_split:
            return self.source.size(split)
        return sum(name in self.own for name in self.train_ids)  # equal rows may share an id


class RejectView(InteractionView):
    """All training rows, those of other categories with a class of their own, the last.

    Args:
        source: see `InteractionView`.
        table: see `InteractionView`.
        train_split: see `InteractionView`.
        category: see `SubsetView`.

    Raises:
        ConfigError: no such category.
        DataError: no training row has it.
    """

    def __init__(
        self, source: DataSource, table: InteractionTable, *, train_split: str, category: str
    ) -> None:
        super().__init__(source, table, train_split=train_split)
        own = own_ids(table, category, split=train_split)
        self.rejected = set(self.train_ids) - own
        if len(self.rejected) == len(self.train_ids):
            raise _no_row(table, category, split=train_split)
        self.label_names = (*self.label_names, REJECT)
        self.task = None  # a family of two classes has no scores for three

    def relabelled(self, sample: Sample) -> Sample:
        """The last class for a training row of another category."""
        if sample.label is None or sample.id not in self.rejected:
            return sample
        return dataclasses.replace(sample, label=len(self.label_names) - 1)


class CategoryView(InteractionView):
    """The categories as labels: what a fuser is trained on, and how well it finds them.

    Its classes are those of R, U, AS and DS that a training row has, in this order. A sample of
    another category, or without one, has no label.

    Args:
        source: see `InteractionView`.
        table: see `InteractionView`.
        train_split: see `InteractionView`.

    Raises:
        DataError: the training rows have fewer than two categories.
    """

    def __init__(self, source: DataSource, table: InteractionTable, *, train_split: str) -> None:
        super().__init__(source, table, train_split=train_split)
        self.label_names = tuple(found_categories(table, split=train_split))
        if len(self.label_names) < 2:
            raise DataError(
                f"the training rows are all of category {', '.join(self.label_names)}; a fuser "
                "needs two categories."
            )
        place = {COARSE.index(name): n for n, name in enumerate(self.label_names)}
        coded = zip(table.ids, table.coarse_N.tolist(), strict=True)
        self.label_of = {one: place.get(code) for one, code in coded}
        self.task = None
        lacking = set(self.splits()) - set(table.splits)
        why = dict.fromkeys(lacking, "the interaction table has no row of it")
        self.unlabelled = {**self.unlabelled, **why}

    def relabelled(self, sample: Sample) -> Sample:
        """The sample with its category as label."""
        return dataclasses.replace(sample, label=self.label_of.get(sample.id))


def view_of(source: DataSource, arguments: Mapping[str, Any]) -> DataSource:
    """The data set as a run's flags want it.

    Args:
        source: the data set.
        arguments: a run's arguments by name; flags that an older run did not have may be absent.

    Raises:
        ConfigError: flags that contradict each other, or no such category.
        DataError: a table that does not fit, or no row of the category.
    """
    category = arguments.get("interaction_subset")
    reject, target = arguments.get("reject_class"), arguments.get("interaction_target")
    if reject and not category:
        raise ConfigError(
            "--reject_class true needs --interaction_subset CATEGORY, whose rows keep their labels."
        )
    if target and category:
        raise ConfigError(
            "--interaction_target true trains a fuser on all categories; leave out "
            f"--interaction_subset {category}."
        )
    if not (category or target):
        return source
    if not arguments.get("interaction_table"):
        flag = "interaction_target" if target else "interaction_subset"
        raise ConfigError(
            f"--{flag} needs --interaction_table FILE (from `launch/prepare_data.py interactions`)."
        )
    table = InteractionTable.load(arguments["interaction_table"])
    train_split = arguments["train_split"]
    if target:
        return CategoryView(source, table, train_split=train_split)
    kind = RejectView if reject else SubsetView
    return kind(source, table, train_split=train_split, category=str(category))


def found_categories(table: InteractionTable, *, split: str) -> list[str]:
    """The coarse categories that a split's rows have, in the order of `COARSE`."""
    codes = set(table.coarse_N[table.rows_of(split)].tolist())
    return [name for code, name in enumerate(COARSE) if code in codes]


def own_ids(table: InteractionTable, category: str, *, split: str) -> set[str]:
    """The ids of a split that have a category.

    Raises:
        ConfigError: there is no such category.
    """
    rows = table.rows_of(split)
    if category in COARSE:
        own = table.coarse_N[rows] == COARSE.index(category)
    elif category in table.names:
        own = table.code_N[rows] == table.names.index(category)
    else:
        known = list(dict.fromkeys((*COARSE, *table.names)))
        raise ConfigError(f"unknown interaction category {category!r}; {nearest(category, known)}")
    return {table.ids[row] for row in rows[own]}


def _no_row(table: InteractionTable, category: str, *, split: str) -> DataError:
    codes = table.coarse_N[table.rows_of(split)].tolist()
    counts = Counter("none" if code == NONE else COARSE[code] for code in codes)
    there = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    return DataError(
        f"no row of split {split!r} has the interaction category {category!r}; there are {there}."
    )
