"""What BLIP-2's first stage asks of the flags and of the tokenizer."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from mm_moe.errors import ConfigError
from mm_moe.models.folder import AnyConfig
from mm_moe.models.processing import Processor, TextProcessor
from pretrain.blip2 import Blip2StageOne

START_WORDS = ("[DEC]",)  # what published tokenizers call the token that asks for a text


def check_stage_one(values: argparse.Namespace, objective: Any) -> None:
    """Refuse flags that the first stage does not go with.

    Raises:
        ConfigError: another backbone, prompts, several members, or GradCache.
    """
    if not isinstance(objective, Blip2StageOne):
        return
    if values.backbone != "blip2":
        raise ConfigError(
            f"--objective {values.objective} trains BLIP-2's Q-Former, --backbone says "
            f"{values.backbone!r}; take --backbone blip2."
        )
    if values.grad_cache:
        raise ConfigError(
            f"--grad_cache true does not go with --objective {values.objective}, whose matching is "
            "no function of features; leave it out (contrast and negatives are then those of a "
            "micro-batch)."
        )
    if values.experts_over:
        raise ConfigError(
            f"--objective {values.objective} trains one model; leave --experts_over out."
        )
    if prompts := [name for name in [values.prompt, *values.compare_with] if name != "none"]:
        raise ConfigError(
            f"--objective {values.objective} runs no prompts, and {prompts[0]!r} is asked for; "
            "take --prompt none."
        )


def stage_one_fields(objective: Any) -> dict[str, Any]:
    """The backbone settings that go with an objective."""
    return {"stage_one": True} if isinstance(objective, Blip2StageOne) else {}


def check_start_token(config: AnyConfig, processors: Mapping[str, Processor]) -> None:
    """Refuse a tokenizer that uses the start token of the first stage for a word.

    Raises:
        ConfigError: names the token.
    """
    own = config.to_dict().get("backbone_config", {})
    text = processors.get("text")
    if not own.get("stage_one") or not isinstance(text, TextProcessor):
        return
    start = own["start_token"]
    if start >= len(text.tokenizer):
        return
    word = text.tokenizer.convert_ids_to_tokens(start)
    if word not in START_WORDS:
        raise ConfigError(
            f"backbone_config.start_token ({start}) is {word!r} in the tokenizer; it must be a "
            "token of its own. Make qformer_config.vocab_size one larger than the tokenizer "
            f"({len(text.tokenizer)} tokens), or name a token that texts do not have."
        )
