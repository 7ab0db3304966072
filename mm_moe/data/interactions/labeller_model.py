"""A local language or vision-language model as unimodal labeller: no generation, one forward pass.

The score of a class is the probability that its answer word begins right after the prompt. Source:
Yu et al., 2024, section on labelling; there the words are Yes and No. Theirs is left-padded; rows
are padded on the right here and read at their own last token, which is the same for a causal model
and needs no positions.

Axes: N rows, L tokens, V words of the vocabulary, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from mm_moe.data.interactions.question import Question
from mm_moe.errors import CheckpointError, ConfigError


def answer_tokens(tokenizer: PreTrainedTokenizerBase, answers: Sequence[str]) -> list[list[int]]:
    """For each answer the tokens that it may begin with, alone and behind a space.

    Raises:
        ConfigError: two answers begin alike, or the tokenizer does not know a word.
    """
    found: list[list[int]] = []
    for answer in answers:
        first = {_first_token(tokenizer, word) for word in (answer, f" {answer}")}
        found.append(sorted(t for t in first if t is not None and t != tokenizer.unk_token_id))
        if not found[-1]:
            raise ConfigError(f"the model's tokenizer does not know the answer {answer!r}.")
    for place, own in enumerate(found):
        for other in range(place):
            if set(own) & set(found[other]):
                raise ConfigError(
                    f"the answers {answers[other]!r} and {answers[place]!r} begin with the same "
                    "token; take words that differ at their beginning, with --answers."
                )
    return found


def _first_token(tokenizer: PreTrainedTokenizerBase, word: str) -> int | None:
    """The first token that is more than a space."""
    ids = tokenizer(word, add_special_tokens=False)["input_ids"]
    return next((token for token in ids if str(tokenizer.decode([token])).strip()), None)


def last_probabilities(logits_NLV: Tensor, mask_NL: Tensor, tokens: list[list[int]]) -> np.ndarray:
    """Probability (N, C) of each answer's tokens behind each row's last real token."""
    last_N = mask_NL.long().cumsum(-1).argmax(-1)
    last_NV = logits_NLV[torch.arange(len(last_N), device=last_N.device), last_N]
    prob_NV = last_NV.float().softmax(-1)
    return torch.stack([prob_NV[:, ids].sum(-1) for ids in tokens], dim=-1).cpu().numpy()


class FolderModel:
    """What both kinds of model share.

    Args:
        folder: of the weights; nothing in it is run as code.
        question: what is asked.
        device: where the model runs.

    Raises:
        CheckpointError: no such model in the folder.
        ConfigError: answers that the tokenizer cannot tell apart, or an encoder-decoder.
    """

    reader: Any  # the library's tokenizer or processor
    loader: Any

    def __init__(self, folder: str, *, question: Question, device: str = "cpu") -> None:
        self.question, self.device = question, device
        try:
            self.processor = self.reader.from_pretrained(folder, trust_remote_code=False)
            model = self.loader.from_pretrained(folder, trust_remote_code=False, dtype="auto")
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"no model of the kind {self.loader.__name__} could be read from {folder!r} "
                f"({reason})."
            ) from error
        if model.config.is_encoder_decoder or model.config.get_text_config().is_encoder_decoder:
            raise ConfigError(
                f"the model in {folder!r} is an encoder-decoder; labels are read behind the prompt "
                "of a decoder. Take a decoder such as OPT."
            )
        self.model = model.eval().to(device)
        self.tokenizer.padding_side = "right"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokens = answer_tokens(self.tokenizer, question.answers)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the texts."""
        raise NotImplementedError

    @torch.no_grad()
    def _scores(self, rows: Any) -> np.ndarray:
        rows = rows.to(self.device)
        if "pixel_values" in rows:
            rows["pixel_values"] = rows["pixel_values"].to(self.model.dtype)
        logits_NLV = self.model(**rows).logits
        return last_probabilities(logits_NLV, rows["attention_mask"], self.tokens)


class TextModel(FolderModel):
    """A causal language model; asks in its chat format if it has one."""

    reader, loader = AutoTokenizer, AutoModelForCausalLM

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """It is the processor itself."""
        return self.processor

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """Scores (N, C)."""
        prompts = [self.question.ask(text) for text in texts]
        chat = self.tokenizer.chat_template is not None
        if chat:
            prompts = [self._as_chat(prompt) for prompt in prompts]
        rows = self.tokenizer(
            prompts, padding=True, return_tensors="pt", add_special_tokens=not chat
        )
        rows.pop("token_type_ids", None)
        return self._scores(rows)

    def _as_chat(self, prompt: str) -> str:
        messages = [{"role": "user", "content": prompt}]
        return str(
            self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )


class ImageModel(FolderModel):
    """A model of image and text to text, such as BLIP-2; the text is the question alone."""

    reader, loader = AutoProcessor, AutoModelForImageTextToText

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The processor's."""
        return self.processor.tokenizer

    def scores(self, images: Sequence[Image]) -> np.ndarray:
        """Scores (N, C)."""
        prompt = self.question.ask("")
        if self.processor.chat_template is not None:
            content = [{"type": "image"}, {"type": "text", "text": prompt}]
            prompt = self.processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
        rows = self.processor(
            images=list(images), text=[prompt] * len(images), padding=True, return_tensors="pt"
        )
        return self._scores(rows)
