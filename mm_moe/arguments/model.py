"""The backbone, its experts and its prompts."""

from __future__ import annotations

from dataclasses import dataclass, field

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
    model_config: str | None = field(
        default=None,
        metadata={
            "help": "JSON object with the settings of a model of its own kind, which has no "
            "backbone: that of --objective mmvae or mixture_vae."
        },
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
    fill: str | None = field(
        default=None,
        metadata={
            "help": "What stands in for missing modalities' features: zero, mean, default, "
            "neighbour, bank or retriever. Default: zeros that fusion may tell from features."
        },
    )
    fill_config: str | None = field(
        default=None, metadata={"help": "JSON object with the fill's own options."}
    )
    fusion: str = field(
        default="concat",
        metadata={"help": "How features meet before the head: concat, low_rank or transformer."},
    )
    fusion_config: str | None = field(
        default=None,
        metadata={
            "help": "JSON object with the transformer's options: depth, num_heads, hidden, "
            "dropout, sparse (none, alternate, all), num_experts, top_k, router, moe, "
            "legacy_residual."
        },
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
