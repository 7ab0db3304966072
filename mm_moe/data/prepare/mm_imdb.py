"""MM-IMDb (Arevalo et al., 2017): posters and plots, 23 genres, several per movie.

Layout: `images/<id>.jpeg`, `labels/<id>.json` ({"plot": [text, ...], "genres": [name, ...]}) and
`split.json` ({"train": [id, ...], "dev": [...], "test": [...]}, 15,552 / 2,608 / 7,799 ids).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mm_moe.batch import IMAGE, TEXT
from mm_moe.data.prepare.raw import IMAGES, TEXTS, RawDataSet, RawRow, read_json
from mm_moe.data.schema import MULTI_LABEL
from mm_moe.errors import ConfigError, DataError

GENRES = (
    *("Drama", "Comedy", "Romance", "Thriller", "Crime", "Action", "Adventure", "Horror"),
    *("Documentary", "Mystery", "Sci-Fi", "Fantasy", "Family", "Biography", "War", "History"),
    *("Music", "Animation", "Musical", "Western", "Sport", "Short", "Film-Noir"),
)
NAMES = {"train": "train", "validation": "dev", "test": "test"}  # our splits, theirs


class MmImdbRaw(RawDataSet):
    """The published folder.

    Args:
        source: the folder.
        per: "plot" (one row for each plot of a movie, as published scores count: ids "<id>#<n>",
            one group per movie) or "movie" (one row with the movie's first plot).

    Raises:
        ConfigError: another `per`.
    """

    name = "mm_imdb"
    problem_type = MULTI_LABEL
    task = MULTI_LABEL
    label_names = GENRES
    license = (
        "MM-IMDb (Arevalo et al., 2017): for research; posters and plots belong to their owners"
    )
    notes = (
        "Genres in the order of the field; others (Adult, News, ...) are dropped.",
        "Published scores count plots, not movies: a movie's plots are rows with the same labels "
        "and the same missing type (group).",
        "A movie without a plot is kept as one row that lacks its text.",
    )

    def __init__(self, source: Path, *, per: str = "plot") -> None:
        super().__init__(source)
        if per not in ("plot", "movie"):
            raise ConfigError(f"mm_imdb: per is {per!r}; take plot or movie.")
        self.per = per
        self.kinds = {IMAGE: IMAGES, TEXT: TEXTS}
        self.index = self.need("split.json")
        self.need("images")
        self.need("labels")
        self.ids: dict[str, Any] = read_json(self.index, kind=dict)
        for name in NAMES.values():
            if not isinstance(self.ids.get(name), list):
                raise DataError(f"{self.index} has no list {name!r} of ids.")

    def splits(self) -> tuple[str, ...]:
        """Train, validation ("dev") and test, as published."""
        return tuple(NAMES)

    def indices(self) -> list[Path]:
        """The list of splits."""
        return [self.index]

    @property
    def options(self) -> dict[str, Any]:
        """What a row is."""
        return {"per": self.per}

    def rows(self, split: str) -> Iterator[RawRow]:
        """One row for each plot, or for each movie."""
        for movie in map(str, self.ids[NAMES[split]]):
            if Path(movie).name != movie:
                yield RawRow(movie, fault="the id is no file name")
                continue
            try:
                about = read_json(self.source / "labels" / f"{movie}.json", kind=dict)
            except DataError:
                yield RawRow(movie, fault="label file is missing or holds no JSON object")
                continue
            yield from self._movie(movie, about)

    def _movie(self, movie: str, about: dict[str, Any]) -> Iterator[RawRow]:
        plots, genres = about.get("plot"), about.get("genres")
        if not isinstance(plots, list) or not isinstance(genres, list):
            yield RawRow(movie, fault="no list of plots or no list of genres")
            return
        label = [int(genre in genres) for genre in GENRES]
        image = self.source / "images" / f"{movie}.jpeg"
        texts = [text for text in plots if isinstance(text, str) and text.strip()]
        if not any(label):
            yield RawRow(movie, fault="no label: none of the 23 genres")
        elif self.per == "movie" or not texts:
            payload: dict[str, Any] = {IMAGE: image, **({TEXT: texts[0]} if texts else {})}
            yield RawRow(movie, payload, label)
        else:
            for number, text in enumerate(texts):
                yield RawRow(f"{movie}#{number}", {IMAGE: image, TEXT: text}, label, group=movie)
