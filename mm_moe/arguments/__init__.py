"""Every setting of a run that `TrainingArguments` does not own, for `HfArgumentParser`.

Names follow open_clip, DeepSpeed and MoE-LLaVA where those have one. A recipe is a YAML file of
these flags and of `TrainingArguments`' flags; a flag on the command line wins over the recipe.
"""

from mm_moe.arguments.data import COLUMN_FLAGS, STREAM_FLAGS, DataArguments, dataset_options
from mm_moe.arguments.json_flag import parse_json
from mm_moe.arguments.model import (
    FLAG_OF_SETTING,
    ModelArguments,
    MoEArguments,
    PromptArguments,
)
from mm_moe.arguments.objective import ObjectiveArguments
from mm_moe.arguments.run import RunArguments

__all__ = [
    "COLUMN_FLAGS",
    "FLAG_OF_SETTING",
    "STREAM_FLAGS",
    "DataArguments",
    "MoEArguments",
    "ModelArguments",
    "ObjectiveArguments",
    "PromptArguments",
    "RunArguments",
    "dataset_options",
    "parse_json",
]
