"""The objective's own options."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class ObjectiveArguments:
    """The objective's own options; `--objective` itself is an argument of the run."""

    objective_config: str | None = field(
        default=None,
        metadata={
            "help": "JSON object with the objective's options; of contrastive: loss (softmax, "
            "sigmoid), variant (gather, chunked, ring), chunk (rows and columns of a tile); of "
            "blip2_stage1: itc_weight, itm_weight, itg_weight, itc_smoothing, itg_smoothing, seed; "
            "of mixture_vae: bound (elbo, m_elbo, iwae, iwae_looser, dreg_looser), samples (draws)."
        },
    )
    grad_cache: bool = field(
        default=False,
        metadata={
            "help": "With gradient_accumulation_steps: one contrastive loss over all micro-batches "
            "of a step instead of one for each; every forward pass is made twice."
        },
    )
    siglip: bool = field(
        default=False, metadata={"help": "open_clip's name for --objective siglip."}
    )
    local_loss: bool = field(
        default=True,
        metadata={"help": "open_clip's flag for a rank's own rows of the logits; always so here."},
    )
    gather_with_grad: bool = field(
        default=True,
        metadata={"help": "open_clip's flag for gradients through the exchange; always so here."},
    )
