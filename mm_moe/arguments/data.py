"""The data set and the missing-modality protocol."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mm_moe.arguments.json_flag import parse_json
from mm_moe.errors import ConfigError

COLUMN_FLAGS = ("image_column", "text_column", "label_column")
STREAM_FLAGS = {"stream_retries": 8, "stream_timeout_s": 60.0}  # options only where changed


def dataset_options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A data set's own options: `--dataset_options`, and the flags that are short for some of them.

    Args:
        arguments: a run's arguments by name; flags that an older run did not have may be absent.

    Raises:
        ConfigError: no JSON object, or a flag that contradicts it.
    """
    options = parse_json("dataset_options", arguments.get("dataset_options"))
    for flag in (*COLUMN_FLAGS, *STREAM_FLAGS):
        value = arguments.get(flag)
        if value is None or value == STREAM_FLAGS.get(flag):
            continue
        if flag in options and options[flag] != value:
            raise ConfigError(
                f"--{flag} {value!r} contradicts --dataset_options, which says {options[flag]!r}; "
                "give one of them."
            )
        options[flag] = value
    return options


@dataclass
class DataArguments:
    """The data set and the missing-modality protocol."""

    dataset: str = field(default="emoji", metadata={"help": "A registered data set name."})
    data_dir: str | None = field(default=None, metadata={"help": "Folder of the data set's files."})
    dataset_options: str | None = field(
        default=None, metadata={"help": "JSON object with the data set's own options."}
    )
    image_column: str | None = field(
        default=None, metadata={"help": "Column with images, for the data set columns."}
    )
    text_column: str | None = field(
        default=None, metadata={"help": "Column with text, for the data set columns."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "Column with the label, for the data set columns."}
    )
    train_split: str = field(default="train", metadata={"help": "Split to train on."})
    validation_split: str = field(
        default="validation", metadata={"help": "Split that eval_strategy scores during training."}
    )
    test_split: str = field(default="test", metadata={"help": "Split of the final table."})
    zero_shot_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Labelled images that a model trained without labels classifies by their "
            "class names (default: the run's own data set, if it has classes)."
        },
    )
    zero_shot_data_dir: str | None = field(
        default=None, metadata={"help": "Folder of that data set's files."}
    )
    zero_shot_options: str | None = field(
        default=None, metadata={"help": "JSON object with that data set's own options."}
    )
    zero_shot_templates: str | None = field(
        default=None,
        metadata={"help": "File of prompt templates, one a line, {} where the class name goes."},
    )
    shuffle_buffer: int = field(
        default=10_000, metadata={"help": "Rows held to shuffle a stream; 0 keeps its order."}
    )
    missing_type: str = field(
        default="none",
        metadata={
            "help": "What goes missing in training: none, a modality or several joined by +, both "
            "(one of two), any (one of several), or subset (any but all)."
        },
    )
    missing_ratio: float = field(
        default=0.0, metadata={"help": "Share of the samples that lack something."}
    )
    missing_table: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Stored missing tables, FILE or SPLIT=FILE (ours, or an old .pt): that of the "
            "training split says what is missing in training, one of a scored split is one more "
            "condition, 'table'."
        },
    )
    missing_seed: int = field(default=0, metadata={"help": "Seed of the missing mask."})
    modality_dropout: float = field(
        default=0.0,
        metadata={
            "help": "Chance that training takes a modality from a sample, anew in every epoch."
        },
    )
    drop_incomplete: bool = field(
        default=False,
        metadata={
            "help": "Train on the rows that have every modality, by nature and by the mask alike."
        },
    )
    interaction_table: str | None = field(
        default=None,
        metadata={
            "help": "Categories of the training rows, from `launch/prepare_data.py interactions`."
        },
    )
    interaction_labels: str = field(
        default="coarse",
        metadata={
            "help": "What of the table a batch carries: coarse (R, U, AS, DS), fine (U by "
            "modality), or the weights coarse_soft or fine_soft."
        },
    )
    interaction_subset: str | None = field(
        default=None,
        metadata={
            "help": "Train an expert for one category of the table: R, U, AS, DS, or U_<modality>; "
            "on its rows alone."
        },
    )
    reject_class: bool = field(
        default=False,
        metadata={
            "help": "With interaction_subset: train on all rows, those of other categories with a "
            "class of their own."
        },
    )
    interaction_target: bool = field(
        default=False,
        metadata={"help": "Train a fuser: the labels are the categories of the table."},
    )
    augment: str | None = field(
        default=None,
        metadata={
            "help": "JSON object of changes to training pictures: random_resized_crop [0.9, 1.0], "
            "ratio, horizontal_flip 0.5, color_jitter [0.4, 0.4, 0.4, 0.1], color_jitter_share, "
            "gray 0.2; by default none."
        },
    )
    max_bad_samples: int = field(
        default=100, metadata={"help": "Undecodable samples after which the run stops."}
    )
    max_bad_share: float = field(
        default=0.0,
        metadata={
            "help": "Share of undecodable samples after which the run stops, judged as if at least "
            "1,000 samples (or the whole split) had been seen; 0 leaves it to max_bad_samples."
        },
    )
    stream_retries: int = field(
        default=8, metadata={"help": "Further tries of a request that fails, for HTTP addresses."}
    )
    stream_timeout_s: float = field(
        default=60.0,
        metadata={
            "help": "Seconds that an HTTP request may take to answer, and then for each MiB of it."
        },
    )
