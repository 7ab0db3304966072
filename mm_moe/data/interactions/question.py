"""How a language model is asked for a class, in words.

Axes: C classes.
"""

from __future__ import annotations

from dataclasses import dataclass

from mm_moe.errors import ConfigError

TEMPLATE = "{question}\n\n{input}\n\nAnswer with one word ({answers}).\nAnswer:"
YES_NO = ("No", "Yes")  # in the order of two classes


@dataclass(frozen=True)
class Question:
    """A question with one answer word for each class.

    Attributes:
        text: the question.
        answers: C words, in the order of the classes.
        template: what is asked, with the places {question}, {input} (the text; nothing for an
            image) and {answers}.

    Raises:
        ConfigError: answers that are empty or equal, or a template with other places.
    """

    text: str
    answers: tuple[str, ...]
    template: str = TEMPLATE

    def __post_init__(self) -> None:
        words = [answer.strip().casefold() for answer in self.answers]
        if len(set(words)) < len(words) or not all(words):
            raise ConfigError(f"--answers {' '.join(self.answers)} must be different words.")
        try:
            self.ask("")
        except (KeyError, IndexError, ValueError) as error:
            raise ConfigError(
                "--template may hold {question}, {input} and {answers}, and no other braces; "
                f"it has {error}."
            ) from error

    @classmethod
    def of(
        cls,
        label_names: tuple[str, ...],
        *,
        text: str | None = None,
        answers: list[str] | None = None,
        template: str | None = None,
    ) -> Question:
        """The question for a data set: yes or no for two classes, else the class names.

        Raises:
            ConfigError: as many answers as there are classes are needed.
        """
        words = tuple(answers or (YES_NO if len(label_names) == 2 else map(_words, label_names)))
        if len(words) != len(label_names):
            raise ConfigError(
                f"--answers has {len(words)} words, the data set {len(label_names)} classes "
                f"({', '.join(label_names)}); give one for each, in this order."
            )
        if text is None:
            text = f"Is this {_words(label_names[1])}?" if len(label_names) == 2 else "What is it?"
        return cls(text, words, template or TEMPLATE)

    def ask(self, content: str) -> str:
        """The whole prompt for one text, or for an image with ""."""
        prompt = self.template.format(
            question=self.text, input=content, answers=", ".join(self.answers)
        )
        return prompt if content else prompt.replace("\n\n\n\n", "\n\n")


def _words(name: str) -> str:
    return name.replace("_", " ").strip()
