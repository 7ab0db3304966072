"""Every setting of a run that `TrainingArguments` does not own, for `HfArgumentParser`.

Names follow open_clip, DeepSpeed and MoE-LLaVA where those have one. A recipe is a YAML file of
these flags and of `TrainingArguments`' flags; a flag on the command line wins over the recipe.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mm_moe.errors import ConfigError

FLAG_OF_SETTING = {  # of `MoESettings`; the other settings are reached by --moe_config
    "num_experts": "num_experts",
    "top_k": "top_k_experts",
    "router": "router",
    "load_balance_coef": "router_aux_loss_coef",
    "router_z_coef": "router_z_loss_coef",
    "use_residual": "use_residual",
    "num_shared_experts": "num_shared_experts",
    "drop_tokens": "drop_tokens",
    "capacity_factor": "capacity_factor",
    "eval_capacity_factor": "eval_capacity_factor",
    "min_capacity": "min_capacity",
}


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


COLUMN_FLAGS = ("image_column", "text_column", "label_column")


def dataset_options(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A data set's own options: `--dataset_options`, and the flags that are short for some of them.

    Args:
        arguments: a run's arguments by name; flags that an older run did not have may be absent.

    Raises:
        ConfigError: no JSON object, or a flag that contradicts it.
    """
    options = parse_json("dataset_options", arguments.get("dataset_options"))
    for flag in COLUMN_FLAGS:
        value = arguments.get(flag)
        if value is None:
            continue
        if options.get(flag, value) != value:
            raise ConfigError(
                f"--{flag} {value!r} contradicts --dataset_options, which says {options[flag]!r}; "
                "give one of them."
            )
        options[flag] = value
    return options


@dataclass
class ModelArguments:
    """The backbone and what of it is trained."""

    backbone: str = field(default="small_clip", metadata={"help": "A registered backbone name."})
    pretrained: str | None = field(
        default=None,
        metadata={"help": "Weights to start from: none, builtin, a file, a folder or a Hub name."},
    )
    backbone_config: str | None = field(
        default=None, metadata={"help": "JSON object that overrides the backbone's configuration."}
    )
    model: str | None = field(
        default=None,
        metadata={
            "help": "An open_clip model such as ViT-B-16: short for --backbone open_clip and "
            "--backbone_config '{\"model\": ...}'; --pretrained is then a tag or a file."
        },
    )
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub name with the tokenizer, or builtin for small_clip's; default: "
            "that of the pretrained weights."
        },
    )
    keep_head: bool = field(
        default=False,
        metadata={
            "help": "With --pretrained a model of this library: take its head, too, class by class."
        },
    )
    pad_text: int | None = field(
        default=None,
        metadata={
            "help": "Fill every text up to the longest that the model takes with this token id "
            "(REP's release: 0), for prompts that attend to padding. Default: to the longest of "
            "the batch, with the tokenizer's own."
        },
    )
    feature_norm: bool = field(
        default=True,
        metadata={"help": "Bring each feature to mean 0 and variance 1 before the head."},
    )
    fusion: str = field(
        default="concat",
        metadata={"help": "How features meet before the head: concat or low_rank."},
    )
    fusion_rank: int = field(default=40, metadata={"help": "Factors of the low-rank tensor."})
    fusion_size: int = field(
        default=120, metadata={"help": "Width of what the low-rank tensor gives."}
    )
    head_hidden_size: int = field(
        default=0, metadata={"help": "Width of a hidden layer in the head; 0: none."}
    )
    experts_over: list[str] | None = field(
        default=None,
        metadata={
            "help": "Members of a composed model, each over one modality or several joined by +: "
            "image audio image+audio."
        },
    )
    combine: str = field(
        default="product",
        metadata={"help": "How members' predictions become one: product, mixture or mean."},
    )
    members_config: str | None = field(
        default=None,
        metadata={"help": "JSON object: member (or gate, of a mixture) -> its own options."},
    )
    init_members: list[str] | None = field(
        default=None,
        metadata={"help": "MEMBER=RUN: start members from finished runs, as they were trained."},
    )
    freeze_members: list[str] | None = field(
        default=None, metadata={"help": "Members that are not trained."}
    )
    lock_image: bool = field(
        default=False, metadata={"help": "Freeze the dense weights of the image tower."}
    )
    lock_text: bool = field(
        default=False, metadata={"help": "Freeze the dense weights of the text tower."}
    )
    unlock_blocks: int = field(
        default=0, metadata={"help": "Last blocks of each locked tower that train all the same."}
    )
    lora_r: int = field(
        default=0,
        metadata={"help": "Rank of LoRA adapters; locks both towers' dense weights. 0: none."},
    )
    lora_alpha: float = field(
        default=16.0, metadata={"help": "LoRA updates are scaled by lora_alpha / lora_r."}
    )
    lora_dropout: float = field(
        default=0.0, metadata={"help": "Dropout of the adapters' input in training."}
    )
    lora_target: list[str] | None = field(
        default=None,
        metadata={
            "help": "Names of linear layers that get adapters (default: attention projections)."
        },
    )


@dataclass
class MoEArguments:
    """The expert layers and how they are spread over processes."""

    moe_enable: bool = field(
        default=True, metadata={"help": "Turn chosen feed-forwards into experts."}
    )
    num_experts: list[int] = field(
        default_factory=lambda: [4],
        metadata={"help": "Experts of every MoE layer, or one number per MoE layer of a tower."},
    )
    top_k_experts: int = field(default=1, metadata={"help": "Experts that each token visits."})
    router: str = field(default="topk_softmax", metadata={"help": "A registered router name."})
    moe_mode: str | None = field(
        default=None,
        metadata={
            "help": "Blocks with experts: sparse (every second, the default), dense (all), "
            "first_half or second_half."
        },
    )
    moe_every: int | None = field(
        default=None, metadata={"help": "Experts in every N-th block (default: 2)."}
    )
    moe_layers_idx: list[int] | None = field(
        default=None, metadata={"help": "Blocks with experts, instead of a mode."}
    )
    use_residual: bool = field(
        default=False, metadata={"help": "Mix the experts' output with a dense feed-forward's."}
    )
    num_shared_experts: int = field(
        default=0, metadata={"help": "Feed-forwards that every token visits besides its choices."}
    )
    drop_tokens: bool = field(
        default=False,
        metadata={"help": "Give experts a capacity and drop the tokens beyond it (default: none)."},
    )
    capacity_factor: float = field(
        default=1.25,
        metadata={"help": "With drop_tokens: capacity in training, relative to an even load."},
    )
    eval_capacity_factor: float = field(
        default=2.0, metadata={"help": "With drop_tokens: the same in evaluation."}
    )
    min_capacity: int = field(
        default=4, metadata={"help": "With drop_tokens: tokens that an expert takes at least."}
    )
    router_aux_loss_coef: float = field(
        default=0.01, metadata={"help": "Weight of the load-balance loss."}
    )
    router_z_loss_coef: float = field(
        default=0.001, metadata={"help": "Weight of the router z-loss."}
    )
    upcycle_noise: float = field(
        default=0.0,
        metadata={"help": "Relative noise on the copied experts, to break their symmetry."},
    )
    upcycle_drop: float = field(
        default=0.0,
        metadata={
            "help": "Share of the hidden units that each copied expert draws anew; above 0 the "
            "model no longer starts as the dense one."
        },
    )
    moe_config: str | None = field(
        default=None, metadata={"help": "JSON object with further settings of the MoE layer."}
    )
    ep_size: int = field(
        default=0,
        metadata={"help": "Processes that share one set of experts; 0: the largest within a node."},
    )
    interaction_experts: bool = field(
        default=False,
        metadata={
            "help": "Let the head be a mixture of experts for redundancy, uniqueness and synergy."
        },
    )
    interaction_config: str | None = field(
        default=None, metadata={"help": "JSON object with settings of the interaction experts."}
    )
    moe_backend: str = field(
        default="ours",
        metadata={"help": "ours, or deepspeed: its own layer, which can do less (see the limits)."},
    )


@dataclass
class PromptArguments:
    """The prompts that make the model robust to missing modalities."""

    prompt: str = field(default="none", metadata={"help": "A registered prompt name."})
    prompt_config: str | None = field(
        default=None, metadata={"help": "JSON object with the prompt's own options."}
    )


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
    max_bad_samples: int = field(
        default=100, metadata={"help": "Undecodable samples after which the run stops."}
    )


@dataclass
class RunArguments:
    """What the program does around training."""

    config: str | None = field(default=None, metadata={"help": "Recipe: a YAML file of flags."})
    global_batch_size: int = field(
        default=0,
        metadata={
            "help": "Samples of one optimizer step over all processes; sets "
            "per_device_train_batch_size, so that any number of processes follows one loss curve."
        },
    )
    objective: str = field(default="supervised", metadata={"help": "A registered objective name."})
    compare_with: list[str] = field(
        default_factory=list,
        metadata={"help": "Prompts whose models are trained in the same way for the final table."},
    )
    new_parts_lr_scale: float = field(
        default=1.0, metadata={"help": "Learning-rate factor of prompts and head."}
    )
    final_evaluation: bool = field(
        default=True, metadata={"help": "Score the test split per missing pattern at the end."}
    )
