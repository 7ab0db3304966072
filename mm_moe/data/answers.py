"""Answers to questions about images: one spelling, a vocabulary, and shares by annotators.

Where we differ from the published evaluation of VQA (Antol et al., 2015): its table of contractions
("dont" to "don't") is not applied; answers and vocabulary pass through the same function here, so
that only a mixture of both spellings among the annotators is told apart.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Mapping, Sequence

SHARES = (0.0, 0.3, 0.6, 0.9, 1.0)  # by how many annotators gave the answer, 4 or more: the last
MIN_COUNT = 9
ARTICLES = frozenset({"a", "an", "the"})
NUMBERS = {
    **{"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4"},
    **{"five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"},
}
_IN_NUMBERS = re.compile(r"(?<=\d),(?=\d)")
_PUNCTUATION = re.compile(r"[;/\[\]\"{}()=+\\_\-><@`,?!]")
_LONE_POINT = re.compile(r"\.(?!\d)")


def plain_answer(text: object) -> str:
    """An answer in small letters, without punctuation and articles, numbers to ten as digits.

    An answer that consists of these alone ("the", "-") is kept as it is, in small letters.
    """
    small = str(text).lower().strip()
    bare = _PUNCTUATION.sub(" ", _IN_NUMBERS.sub("", _LONE_POINT.sub("", small)))
    words = [NUMBERS.get(word, word) for word in bare.split() if word not in ARTICLES]
    return " ".join(words) or small


def vocabulary(answers: Iterable[str], *, min_count: int) -> tuple[str, ...]:
    """The answers (one per question) that occur at least so often, most frequent first."""
    counts = collections.Counter(map(plain_answer, answers))
    kept = [answer for answer, count in counts.items() if count >= min_count]
    return tuple(sorted(kept, key=lambda answer: (-counts[answer], answer)))


def answer_shares(answers: Sequence[str], index_of: Mapping[str, int]) -> dict[int, float]:
    """Soft target of one question: class -> share, for the annotators' answers that have a class.

    The shares are those of `SHARES`: 0.3 for an answer that one annotator gave, 1 from four on.
    """
    counts = collections.Counter(map(plain_answer, answers))
    return {
        index_of[answer]: SHARES[min(count, len(SHARES) - 1)]
        for answer, count in counts.items()
        if answer in index_of
    }
