"""Language models as labellers: from a local folder, or behind an endpoint."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mm_moe.batch import IMAGE, TEXT, Sample, base_modality
from mm_moe.data.decode import UndecodableImageError, decode_image
from mm_moe.data.interactions.hard_labels import UniScores
from mm_moe.data.interactions.labeller_endpoint import Endpoint
from mm_moe.data.interactions.labeller_model import ImageModel, TextModel
from mm_moe.data.interactions.question import Question
from mm_moe.data.interactions.strict_json import read_lines
from mm_moe.data.schema import DataSource
from mm_moe.errors import ConfigError

ANSWERS = "answers"  # folder of what an endpoint has answered
Scores = dict[str, dict[str, UniScores]]


def add_flags(flags: argparse._ArgumentGroup) -> None:
    """The flags of these labellers."""
    add = flags.add_argument
    add("--question", help="what is asked (default: made of the class names)")
    add("--answers", nargs="+", help="a word for each class, in order (default: No Yes)")
    add("--template", help="the prompt, with {question}, {input} and {answers}")
    add("--model", help="folder of a causal language model, for texts")
    add("--image_model", help="folder of a model of image and text to text, for images")
    add("--url", help="base address of an OpenAI-compatible endpoint, ending in /v1")
    add("--served_model", help="the model's name there")
    add("--key_variable", default="OPENAI_API_KEY", help="environment variable with the key")
    add("--attempts", type=int, default=5, help="requests for one sample at most")
    add("--timeout_s", type=float, default=60.0, help="of one request")
    add("--requests", type=int, default=4, help="sent at the same time")


def question_of(options: argparse.Namespace, source: DataSource) -> Question:
    """The question of the flags.

    Raises:
        ConfigError: it does not fit the classes, or a modality is neither image nor text.
    """
    for modality in source.modalities:
        if base_modality(modality) not in (IMAGE, TEXT) or modality in source.sequences:
            raise ConfigError(
                f"modality {modality!r} of {source.name!r} is neither image nor text; take "
                "--labeller own or files."
            )
    return Question.of(
        source.label_names,
        text=options.question,
        answers=options.answers,
        template=options.template,
    )


def contents(source: DataSource, split: str, modality: str) -> Iterator[tuple[str, Any]]:
    """(id, text or decoded image) of each row, None where there is none."""
    for row in source.stream(split):
        sample = source.to_sample(row)
        value = sample.payload.get(modality)
        if value is not None and base_modality(modality) == IMAGE:
            try:
                value = decode_image(value)
            except UndecodableImageError:
                value = None
        yield sample.id, value or None if isinstance(value, str) else value


def label_by_folder(
    options: argparse.Namespace, source: DataSource, samples: Mapping[str, list[Sample]]
) -> tuple[Scores, None, dict[str, Any]]:
    """Scores by local models.

    Raises:
        ConfigError: a modality without a model, or a question that does not fit.
        CheckpointError: a model that cannot be read.
    """
    question = question_of(options, source)
    device = "cuda" if torch.cuda.is_available() and not options.use_cpu else "cpu"
    kinds = {IMAGE: (ImageModel, options.image_model), TEXT: (TextModel, options.model)}
    models: dict[str, Any] = {}
    for kind in dict.fromkeys(map(base_modality, source.modalities)):
        make, folder = kinds[kind]
        if folder is None:
            flag = "--image_model" if kind == IMAGE else "--model"
            raise ConfigError(f"--labeller transformers needs {flag} DIR for {kind}.")
        models[kind] = make(folder, question=question, device=device)
    scores: Scores = {}
    for modality in source.modalities:
        model = models[base_modality(modality)]
        scores[modality] = {
            split: _in_batches(model, contents(source, split, modality), modality, options, source)
            for split in samples
        }
    names = {kind: Path(kinds[kind][1]).name for kind in models}
    return scores, None, {"models": names, "question": vars(question)}


def _in_batches(
    model: Any,
    rows: Iterator[tuple[str, Any]],
    modality: str,
    options: argparse.Namespace,
    source: DataSource,
) -> UniScores:
    ids: list[str] = []
    parts = [np.empty((0, len(source.label_names)))]
    while batch := list(islice(rows, options.batch_size)):
        score_NC = np.full((len(batch), len(source.label_names)), np.nan)
        there = [place for place, (_, value) in enumerate(batch) if value is not None]
        if there:
            score_NC[there] = model.scores([batch[place][1] for place in there])
        ids += [sample_id for sample_id, _ in batch]
        parts.append(score_NC)
    return UniScores(tuple(ids), modality, np.concatenate(parts))


def label_by_endpoint(
    options: argparse.Namespace, source: DataSource, samples: Mapping[str, list[Sample]]
) -> tuple[Scores, None, dict[str, Any]]:
    """Scores from an endpoint; what it answered is kept, so that a cut run goes on.

    Raises:
        ConfigError: no address or model, or the endpoint refuses.
        DataError: it does not answer.
    """
    question = question_of(options, source)
    if not options.url or not options.served_model:
        raise ConfigError("--labeller endpoint needs --url and --served_model.")
    if options.requests < 1:
        raise ConfigError(f"--requests {options.requests} must be at least 1.")
    endpoint = Endpoint(
        options.url,
        options.served_model,
        question,
        key=os.environ.get(options.key_variable),
        attempts=options.attempts,
        timeout_s=options.timeout_s,
    )
    scores: Scores = {}
    for modality in source.modalities:
        kept = KeptAnswers(options.output / ANSWERS / f"{modality}.jsonl", endpoint)
        scores[modality] = {
            split: _ask_all(endpoint, kept, source, split, modality, at_once=options.requests)
            for split in samples
        }
    origin = {"served_model": options.served_model, "host": endpoint.host}
    return scores, None, {**origin, "question": vars(question)}


class KeptAnswers:
    """Answers in a file of JSON lines, valid for one model and question.

    Args:
        path: the file.
        endpoint: whose answers they are.
    """

    def __init__(self, path: Path, endpoint: Endpoint) -> None:
        self.path = path
        asked = json.dumps([endpoint.url, endpoint.model, vars(endpoint.question)])
        self.asked = hashlib.sha256(asked.encode()).hexdigest()[:16]
        self.num_answers = len(endpoint.question.answers)
        self.known: dict[str, np.ndarray] = {}
        if path.is_file() and path.stat().st_size:
            for entry in read_lines(path, id_key="id"):
                if entry.need("asked") == self.asked:
                    value = entry.need("scores")
                    wanted = (self.num_answers,)
                    found = [np.nan] * self.num_answers
                    if value is not None:
                        found = entry.numbers("scores", value, counts=wanted)
                    self.known[entry.name] = np.array(found)

    def keep(self, sample_id: str, score_C: np.ndarray) -> None:
        """Note an answer at once."""
        self.known[sample_id] = score_C
        self.path.parent.mkdir(parents=True, exist_ok=True)
        value = None if np.isnan(score_C).any() else score_C.tolist()
        record = {"id": sample_id, "asked": self.asked, "scores": value}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def _ask_all(
    endpoint: Endpoint,
    kept: KeptAnswers,
    source: DataSource,
    split: str,
    modality: str,
    *,
    at_once: int,
) -> UniScores:
    """Ask for every row that is not known yet; failures stop the rest."""
    ids: list[str] = []
    found: list[np.ndarray] = []
    rows = contents(source, split, modality)
    with ThreadPoolExecutor(at_once) as pool:
        while batch := list(islice(rows, 4 * at_once)):
            new = [(i, value) for i, value in batch if i not in kept.known and value is not None]
            asked = [pool.submit(endpoint.scores, value) for _, value in new]
            for (sample_id, _), answer in zip(new, asked, strict=True):
                kept.keep(sample_id, answer.result())
            nothing_C = np.full(kept.num_answers, np.nan)
            for sample_id, value in batch:
                ids.append(sample_id)
                found.append(nothing_C if value is None else kept.known[sample_id])
    return UniScores(tuple(ids), modality, np.stack(found))
