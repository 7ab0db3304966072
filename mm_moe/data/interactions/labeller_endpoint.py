"""An OpenAI-compatible endpoint as unimodal labeller: log-probabilities of the first token.

The key goes into one header and nowhere else: it is in no message, log or file, and no redirect is
followed that could carry it elsewhere.

Axes: C classes.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL.Image import Image

from mm_moe.data.interactions.question import Question
from mm_moe.errors import ConfigError, DataError

TOP = 5  # likeliest tokens that an endpoint tells
LONGEST_WAIT_S = 30.0
LARGEST = 1 << 20  # bytes of an answer
PASSING = (408, 409, 425, 429, 500, 502, 503, 504)  # states that another attempt may get over


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass(frozen=True)
class Endpoint:
    """Chat completions of one model.

    Attributes:
        url: base address, such as http://localhost:8000/v1.
        model: the name under which it is served.
        question: what is asked.
        key: sent as bearer token; None: none is.
        attempts: requests for one sample at most.
        timeout_s: of one request.
        wait_s: before the second attempt; doubles with each.
        sleep: waits.

    Raises:
        ConfigError: an address that is no http(s) one or holds a password, or a number out of
            range.
    """

    url: str
    model: str
    question: Question
    key: str | None = field(default=None, repr=False)
    attempts: int = 5
    timeout_s: float = 60.0
    wait_s: float = 1.0
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        rule = "--url must be an address such as http://localhost:8000/v1."
        try:
            parts = urllib.parse.urlsplit(self.url)
            port_known = parts.port != 0  # raises where it is no port
        except ValueError as error:
            raise ConfigError(rule) from error
        if parts.scheme not in ("http", "https") or not parts.hostname or not port_known:
            raise ConfigError(rule)
        if parts.username or parts.password or parts.query:
            raise ConfigError(
                "--url must hold no user, password or query; give the key in the environment "
                "variable that --key_variable names."
            )
        if self.attempts < 1 or not 0 < self.timeout_s < math.inf:
            raise ConfigError(
                f"--attempts ({self.attempts}) must be at least 1 and --timeout_s "
                f"({self.timeout_s:g}) above 0."
            )

    @property
    def host(self) -> str:
        """What messages call it."""
        return urllib.parse.urlsplit(self.url).netloc

    def scores(self, content: str | Image) -> np.ndarray:
        """Scores (C,) of one text or image; NaN where no answer is among the likeliest tokens.

        Raises:
            ConfigError: the endpoint refuses the request.
            DataError: it does not answer, or not in the format.
        """
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": self._content(content)}],
            "temperature": 0,
            "max_tokens": 1,
            "logprobs": True,
            "top_logprobs": TOP,
        }
        return answer_scores(self._post(json.dumps(body).encode()), self.question.answers)

    def _content(self, content: str | Image) -> Any:
        if isinstance(content, str):
            return self.question.ask(content)
        buffer = io.BytesIO()
        content.save(buffer, "PNG")
        encoded = base64.b64encode(buffer.getvalue()).decode()
        return [
            {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}},
            {"type": "text", "text": self.question.ask("")},
        ]

    def _post(self, body: bytes) -> Any:
        """The parsed answer, after as many attempts as needed."""
        opener = urllib.request.build_opener(_NoRedirect)
        wait_s, reason = self.wait_s, ""
        for attempt in range(self.attempts):
            if attempt:
                self.sleep(min(wait_s, LONGEST_WAIT_S))
                wait_s *= 2
            try:
                with opener.open(self._request(body), timeout=self.timeout_s) as answer:
                    return json.loads(answer.read(LARGEST))
            except urllib.error.HTTPError as error:
                error.close()
                self._judge(error.code)
                reason = f"status {error.code}"
                wait_s = max(wait_s, _seconds(error.headers.get("Retry-After")))
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = type(error).__name__  # its text may quote what was sent
        raise DataError(
            f"{self.host} gave no answer in {self.attempts} attempts (last: {reason}); answers so "
            "far are kept, so the same command goes on from here."
        )

    def _request(self, body: bytes) -> urllib.request.Request:
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        url = f"{self.url.rstrip('/')}/chat/completions"
        return urllib.request.Request(url, data=body, headers=headers, method="POST")

    def _judge(self, status: int) -> None:
        if status in PASSING:
            return
        hints = {
            401: "the key is missing or wrong",
            403: "the key may not do this",
            404: "there is no such address or model",
        }
        raise ConfigError(
            f"{self.host} refuses the request with status {status} "
            f"({hints.get(status, 'it does not take chat completions with top_logprobs')}); check "
            "--url, --served_model and the variable that --key_variable names."
        )


def answer_scores(answer: Any, answers: tuple[str, ...]) -> np.ndarray:
    """Probability (C,) of each answer among the likeliest first tokens; NaN if none is there.

    A token counts for the one answer that it is, or is the beginning of, whatever its case and the
    spaces around it.

    Raises:
        DataError: the format is another one.
    """
    try:
        tokens = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        likely = [(str(entry["token"]), float(entry["logprob"])) for entry in tokens]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise DataError(
            "the endpoint's answer has no choices[0].logprobs.content[0].top_logprobs with token "
            "and logprob; it must support logprobs."
        ) from error
    score_C = np.zeros(len(answers))
    for token, log_probability in likely:
        word = token.strip().casefold()
        meant = [place for place, text in enumerate(answers) if text.casefold() == word]
        meant = meant or [p for p, text in enumerate(answers) if text.casefold().startswith(word)]
        if word and len(meant) == 1 and log_probability <= 1e-6:
            score_C[meant[0]] += math.exp(min(log_probability, 0.0))
    return score_C if score_C.any() else np.full(len(answers), np.nan)


def _seconds(value: str | None) -> float:
    """What a server asks to wait, if it says so in seconds."""
    return float(value) if value and value.strip().isdigit() else 0.0
