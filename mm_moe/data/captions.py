"""Several captions of one picture: one is chosen in training, the first is taken in evaluation.

Web data have an alternative text, a title, and captions that a model wrote; COCO has five captions
a picture. Which one a training step sees is a keyed hash of (seed, epoch, sample), so it changes
from epoch to epoch and depends neither on ranks and workers nor on a resume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mm_moe.data.chance import draws
from mm_moe.errors import ConfigError

PLACE = "{}"  # where a template has the caption


@dataclass(frozen=True)
class Captions:
    """The captions of one sample.

    Attributes:
        texts: at least one, in order.
        weights: how often each is chosen, relative to the others; all positive.
        templates: texts around a caption, chosen evenly.
    """

    texts: tuple[str, ...]
    weights: tuple[float, ...]
    templates: tuple[str, ...] = (PLACE,)

    def __len__(self) -> int:
        """Their number."""
        return len(self.texts)

    @property
    def first(self) -> str:
        """The first caption in the first template: what evaluation sees."""
        return self.templates[0].replace(PLACE, self.texts[0])

    def chosen(self, sample_id: str, *, seed: int, epoch: int) -> str:
        """The caption that an epoch of training sees of a sample."""
        which, frame = draws(sample_id, purpose="caption", dataset=str(epoch), seed=seed)
        template = self.templates[int(frame * len(self.templates))]
        edge = which * sum(self.weights)
        chosen = 0
        while chosen < len(self.texts) - 1 and edge >= self.weights[chosen]:
            edge -= self.weights[chosen]
            chosen += 1
        return template.replace(PLACE, self.texts[chosen])


@dataclass(frozen=True)
class CaptionRule:
    """How the text of a sample is made of one or more columns.

    Attributes:
        columns: column -> weight. A cell may hold a text, a list of texts (which share the weight),
            or nothing.
        templates: see `Captions`.
        join: what stands between the texts of a list that belong together (keywords); None: they
            are captions to choose from.
    """

    columns: Mapping[str, float]
    templates: tuple[str, ...] = (PLACE,)
    join: str | None = None

    def payload(self, cells: Mapping[str, Any]) -> str | bytes | Captions | None:
        """The text of a sample: one caption as it is, several as `Captions`, None without any.

        Bytes that are no UTF-8 come back as they are, where there is no other caption: the collator
        counts them.
        """
        if self._is_plain:
            only = cells.get(next(iter(self.columns)))
            if isinstance(only, str):
                return only
        texts: list[str] = []
        weights: list[float] = []
        broken = None
        for column, weight in self.columns.items():
            cell = cells.get(column)
            if isinstance(cell, bytes):
                try:
                    cell = cell.decode()
                except UnicodeDecodeError:
                    broken = cell
                    continue
            found = self._texts(cell)
            texts += found
            weights += [weight / max(1, len(found))] * len(found)
        if len(texts) == 1 and self.templates == (PLACE,):
            return texts[0]
        return Captions(tuple(texts), tuple(weights), self.templates) if texts else broken

    @property
    def _is_plain(self) -> bool:
        return len(self.columns) == 1 and self.templates == (PLACE,)

    def _texts(self, cell: Any) -> list[str]:
        cells = cell if isinstance(cell, list | tuple) else [cell]
        found = [str(one) for one in cells if _is_text(one)]
        return [self.join.join(found)] if self.join is not None and found else found


def _is_text(cell: Any) -> bool:
    """Whether a cell holds a caption: not None, not NaN (an empty cell of a table), not blank."""
    return cell is not None and cell == cell and bool(str(cell).strip())


def caption_rule(
    columns: str | Sequence[str] | Mapping[str, float],
    *,
    templates: Sequence[str] | None = None,
    join: str | None = None,
    option: str = "text_column",
) -> CaptionRule:
    """A rule from the options of a data set.

    Args:
        columns: one name, several, or name -> weight.
        templates: each with one `{}`.
        join: see `CaptionRule`.
        option: the option that names the columns, for errors.

    Raises:
        ConfigError: a weight that is not positive, a template without a place, or no column.
    """
    if isinstance(columns, str):
        named: dict[str, float] = {columns: 1.0}
    elif isinstance(columns, Mapping):
        named = dict(columns)
    else:
        named = dict.fromkeys(columns, 1.0)
    if not named:
        raise ConfigError(f"{option} names no column; name at least one.")
    for column, weight in named.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0:
            raise ConfigError(
                f"{option} gives {column!r} the weight {weight!r}; it must be a number over 0, or "
                "leave the column out."
            )
    frames = tuple([templates] if isinstance(templates, str) else templates or (PLACE,))
    for frame in frames:
        if not isinstance(frame, str) or frame.count(PLACE) != 1:
            raise ConfigError(
                f"caption template {frame!r} must have one {PLACE} where the caption goes, as in "
                "'a picture of {}'."
            )
    return CaptionRule(named, frames, join)
