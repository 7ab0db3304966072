"""What the program does around training."""

from __future__ import annotations

from dataclasses import dataclass, field


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
    allow_drift: bool = field(
        default=False,
        metadata={"help": "Resume although settings that move the loss curve have changed."},
    )
    compare_with: list[str] = field(
        default_factory=list,
        metadata={"help": "Prompts whose models are trained in the same way for the final table."},
    )
    new_parts_lr_scale: float = field(
        default=1.0, metadata={"help": "Learning-rate factor of prompts and head."}
    )
    max_bad_steps: int = field(
        default=10,
        metadata={
            "help": "Optimizer steps in a row without finite numbers (or with spikes) that are "
            "skipped before the run stops, with bad_numbers.json in its folder."
        },
    )
    skip_spikes: float = field(
        default=0.0,
        metadata={
            "help": "Skip a step whose loss or gradient norm lies this many robust standard "
            "deviations above the last 128 steps (such as 6); 0 skips nothing that is finite."
        },
    )
    final_evaluation: bool = field(
        default=True, metadata={"help": "Score the test split per missing pattern at the end."}
    )
    hub_timeout_s: float = field(
        default=1800.0,
        metadata={"help": "Seconds after which one push is given up, with all that is retried."},
    )
    hub_license: str = field(
        default="other", metadata={"help": "The license of the model, for its card: a Hub id."}
    )
    max_shard_size: str = field(
        default="5GB", metadata={"help": "Largest file of weights in final/: 5GB, 500MB."}
    )
    async_save: bool = field(
        default=False,
        metadata={"help": "Let training go on while a checkpoint is written; costs a copy of it."},
    )
    on_save_failure: str = field(
        default="warn",
        metadata={
            "choices": ["warn", "stop"],
            "help": "When a checkpoint cannot be written: warn (go on, and stop after three in a "
            "row) or stop.",
        },
    )
    hang_timeout_s: float = field(
        default=1800,
        metadata={
            "help": "Seconds without progress after which a process writes its stacks to "
            "stacks-RANK.txt and ends with status 17; start-up, evaluation and saving may take "
            "four times as long, and at least 1800 s. 0 is off."
        },
    )
    rendezvous_timeout_s: float = field(
        default=600,
        metadata={"help": "Seconds in which all processes of a run must have started."},
    )
