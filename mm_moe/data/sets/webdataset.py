"""Tar shards of pictures and captions: the WebDataset layout of LAION, DataComp and img2dataset."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import datasets

from mm_moe.batch import IMAGE, TEXT, Sample
from mm_moe.data.captions import caption_rule
from mm_moe.data.locate import SPLITS, WORDS
from mm_moe.data.reading import reading
from mm_moe.data.remote_tables import expand
from mm_moe.data.retrying import Remote
from mm_moe.data.schema import NO_LABEL, DataSource
from mm_moe.data.tar_shards import BLOCK, RowRule, Shard, read_part, shard_rows, shown
from mm_moe.data.web import is_http, shown_url
from mm_moe.errors import ConfigError, DataError

IMAGES = ("jpg", "jpeg", "png", "webp")
TEXTS = {"txt": 1.0}
JSON = "json."  # "json.caption": the field of a row's .json
SIZES = "sizes.json"  # file name -> rows, as open_clip reads them
WORDS_OF_BRACES = re.compile(r"\{([^{}]*,[^{}]*)\}")


class WebData(DataSource):
    """Pairs in tar shards: `KEY.jpg` beside `KEY.txt` or `KEY.json`, local or at http(s) addresses.

    Rows are read in the order of the sorted shards; nothing is decoded and no pickle is opened.
    A picture without a caption, or a caption without a picture, is a row that lacks something.

    Args:
        data_dir: a folder of `.tar` files (dealt to splits by the words of their names, see
            `locate`), a pattern of files ("DIR/{00000..00041}.tar", "DIR/part-*.tar"), or an http
            address with numbers in braces. Several patterns are joined by "::".
        train: pattern of the training split's files, from `data_dir` on; so are the next two.
        validation: see `train`.
        test: see `train`.
        images: endings of pictures, the preferred one first.
        text: ending of captions ("txt", "json.caption" for a field of the JSON), several, or
            {ending: weight}; see `CaptionRule`. By default "txt", else "json.caption" if the first
            row has no text.
        caption_templates: texts with `{}` around a caption, chosen like captions.
        join_texts: what joins a list of keywords.
        num_samples: rows of the train split, or {split: rows}; without it those that `sizes.json`
            beside the shards tells, else unknown (`--max_steps` then says how long to train).
        name: key of masks; by default "webdataset/" and the folder's name.
        license: who may do what with the data, for the model card.
        stream_retries: further tries of a request that fails, for addresses.
        stream_timeout_s: what a request may take, see `mm_moe.data.retrying.Remote`.

    Raises:
        ConfigError: options that do not fit together.
        DataError: no such files, or a file that is empty or no tar.
    """

    modalities = (IMAGE, TEXT)
    label_names = ()
    problem_type = NO_LABEL
    remote: Remote

    def __init__(
        self,
        data_dir: str | None = None,
        *,
        train: str | None = None,
        validation: str | None = None,
        test: str | None = None,
        images: Sequence[str] = IMAGES,
        text: str | Sequence[str] | Mapping[str, float] | None = None,
        caption_templates: Sequence[str] | None = None,
        join_texts: str | None = None,
        num_samples: int | Mapping[str, int] | None = None,
        name: str | None = None,
        license: str = "not stated",
        stream_retries: int = 8,
        stream_timeout_s: float = 60.0,
    ) -> None:
        if data_dir is None:
            raise ConfigError(
                "data set 'webdataset' needs data_dir: a folder of .tar files, a pattern such as "
                "'DIR/{00000..00041}.tar', or an address with such a pattern."
            )
        self._base, own = _base_of(data_dir)
        super().__init__(None if is_http(self._base) else self._base)
        self.license = license
        self.name = name or f"webdataset/{PurePosixPath(urlsplit(self._base).path).name}"
        self.remote = Remote(retries=stream_retries, timeout_s=stream_timeout_s)
        wanted = {"train": train or own, "validation": validation, "test": test}
        self._shards = self._found({k: v for k, v in wanted.items() if v})
        self._check_files()
        self._given_sizes = {"train": num_samples} if isinstance(num_samples, int) else num_samples
        endings = tuple([images] if isinstance(images, str) else images)
        self._rule = caption_rule(
            text or self._usual_text(endings),
            templates=caption_templates,
            join=join_texts,
            option="text",
        )
        files = ["json" if column.startswith(JSON) else column for column in self._rule.columns]
        self._rows = RowRule(_lower(endings), _lower(dict.fromkeys(files)))

    def _found(self, patterns: dict[str, str]) -> dict[str, list[Shard]]:
        """The shards of each split."""
        places = {split: self._places(pattern) for split, pattern in patterns.items()}
        if not places:
            places = self._by_words()
        for split, found in places.items():
            if not found:
                raise DataError(
                    f"no file matches {shown(patterns[split])!r} ({split}) from "
                    f"{shown(self._base)}; correct the pattern."
                )
        return {
            split: [Shard(place, self._shard_name(place)) for place in found]
            for split, found in places.items()
        }

    def _places(self, pattern: str) -> list[str]:
        """The files of a pattern: every one that braces name, and those that * and ? match."""
        found: list[str] = []
        for part in pattern.split("::"):
            for one in (name for words in _words(part) for name in expand(words)):
                if is_http(one):
                    found.append(one)
                elif is_http(self._base):
                    found.append(f"{self._base.rstrip('/')}/{one.lstrip('/')}")
                else:
                    found += self._local(one)
        return found

    def _local(self, name: str) -> list[str]:
        path = Path(self._base) / Path(name).expanduser()
        if any(sign in name for sign in "*?["):
            return sorted(
                map(str, Path(path.anchor or ".").glob(str(path.relative_to(path.anchor))))
            )
        if not path.is_file():
            raise DataError(f"there is no file {path}; correct the pattern or fetch the file.")
        return [str(path)]

    def _by_words(self) -> dict[str, list[str]]:
        """The shards of a folder, dealt to splits by the words of their names."""
        if is_http(self._base):
            raise DataError(
                f"{shown_url(self._base)} names no file, and no folder can be listed over HTTP; "
                "name the shards, for example 'https://HOST/FOLDER/{00000..00041}.tar'."
            )
        folder = Path(self._base)
        found = sorted([*folder.glob("*.tar"), *folder.glob("*/*.tar")])
        if not found:
            raise DataError(f"{folder} holds no .tar file, nor do its subfolders.")
        dealt: dict[str, list[str]] = {}
        for file in found:
            words = set(re.split(r"[^a-z0-9]+", str(file.relative_to(folder)).lower()))
            homes = [split for split in SPLITS if WORDS[split] & words] or ["train"]
            if len(homes) > 1:
                raise DataError(f"{file} belongs to {' and '.join(homes)} by its name; rename it.")
            dealt.setdefault(homes[0], []).append(str(file))
        return {split: dealt[split] for split in SPLITS if split in dealt}

    def _shard_name(self, place: str) -> str:
        """What the ids of a shard's rows begin with: its path below the folder, without .tar."""
        if is_http(place):
            name = urlsplit(place).path.removeprefix(urlsplit(self._base).path).lstrip("/")
        else:
            name = Path(os.path.relpath(place, self._base)).as_posix()
        return name.removesuffix(".tar")

    def _check_files(self) -> None:
        """Refuse empty and repeated files now, and not when their turn comes."""
        seen: dict[str, str] = {}
        for split, shards in self._shards.items():
            for shard in shards:
                if shard.place in seen:
                    raise DataError(
                        f"{shown(shard.place)} is named twice ({seen[shard.place]}, {split}); its "
                        "rows would have equal ids. Name each file once."
                    )
                seen[shard.place] = split
                if not is_http(shard.place) and Path(shard.place).stat().st_size < BLOCK:
                    raise DataError(f"{shard.place} is empty; fetch or write it again.")

    def _usual_text(self, images: tuple[str, ...]) -> str:
        """The text of the first row: .txt, or the caption of its .json."""
        first = self._shards.get("train") or next(iter(self._shards.values()))
        rule = RowRule(_lower(images), (*TEXTS, "json"))
        with reading(shown(first[0].place)):
            row = next(shard_rows(first[:1], rule=rule, remote=self.remote))
        return f"{JSON}caption" if set(row["texts"]) == {"json"} else next(iter(TEXTS))

    def splits(self) -> tuple[str, ...]:
        """The splits that were found."""
        return tuple(self._shards)

    def stream(self, split: str) -> datasets.IterableDataset:
        """Rows of id, picture (or where it is) and texts, shard by shard."""
        self.check_split(split)
        stream: datasets.IterableDataset = datasets.IterableDataset.from_generator(
            shard_rows,
            gen_kwargs={
                "shards": self._shards[split],
                "rule": self._rows,
                "remote": self.remote,
            },
        )
        return stream

    def to_sample(self, row: dict[str, Any]) -> Sample:
        """The pair of a row; its picture is read here."""
        cells = {column: self._cell(column, row["texts"]) for column in self._rule.columns}
        image = row["image"]
        if image is not None and not isinstance(image, bytes):
            image = read_part(tuple(image))
        payload = {IMAGE: image, TEXT: self._rule.payload(cells)}
        return Sample(row["id"], {name: value for name, value in payload.items() if value})

    def _cell(self, column: str, texts: Mapping[str, bytes]) -> Any:
        """A row's text, or a field of its JSON; bytes that cannot be read stay bytes."""
        if not column.startswith(JSON):
            return texts.get(column.lower())
        content = texts.get("json")
        if content is None:
            return None
        try:
            fields = json.loads(content)
        except (ValueError, RecursionError):
            return b"\xff"  # the collator counts it as a text that cannot be read
        value = fields.get(column.removeprefix(JSON)) if isinstance(fields, dict) else None
        return value if isinstance(value, str | list) else None

    def size(self, split: str) -> int | None:
        """Rows as the options or `sizes.json` tell them; they are not counted."""
        self.check_split(split)
        if self._given_sizes and split in self._given_sizes:
            return int(self._given_sizes[split])
        return self._told_sizes[split]

    @cached_property
    def _told_sizes(self) -> dict[str, int | None]:
        """The sums of what the `sizes.json` beside the shards tell."""
        return {split: _told(shards) for split, shards in self._shards.items()}

    def fingerprint(self) -> str:
        """sha256 over names and sizes of the shards, with the ETags of those at addresses."""
        digest = hashlib.sha256()
        for split, shards in sorted(self._shards.items()):
            for shard in shards:
                if is_http(shard.place):
                    about = self.remote.about(shard.place)
                    what = f"{about.size} {about.tag}"
                else:
                    what = str(Path(shard.place).stat().st_size)
                digest.update(f"{split} {shard.name} {what}\n".encode())
        return digest.hexdigest()


def _base_of(place: str) -> tuple[str, str | None]:
    """The folder that names start from, and the pattern below it, if `place` has one."""
    if "::" not in place and not is_http(place) and Path(place).expanduser().is_dir():
        return str(Path(place).expanduser().resolve()), None
    first = place.split("::")[0]
    if not is_http(first):
        first = str(Path(first).expanduser().absolute())
    if not re.search(r"[{*?\[]|\.tar(\?.*)?$", first):
        if is_http(first):
            return first, None
        raise DataError(f"there is no folder {first}, and it is no pattern of .tar files.")
    head = re.split(r"[{*?\[]", first.partition("?")[0] if is_http(first) else first)[0]
    return head.rpartition("/")[0], place


def _words(name: str) -> list[str]:
    """A name with {a,b} in it as all the names that it stands for."""
    found = WORDS_OF_BRACES.search(name)
    if not found:
        return [name]
    head, tail = name[: found.start()], name[found.end() :]
    return [f"{head}{word}{rest}" for word in found[1].split(",") for rest in _words(tail)]


def _lower(names: Any) -> tuple[str, ...]:
    return tuple(str(name).lower().lstrip(".") for name in names)


def _told(shards: list[Shard]) -> int | None:
    """Rows of shards by the `sizes.json` of their folders; None where one is not told."""
    tables: dict[Path, dict[str, Any]] = {}
    total = 0
    for shard in shards:
        if is_http(shard.place):
            return None
        path = Path(shard.place)
        if path.parent not in tables:
            tables[path.parent] = _sizes_file(path.parent / SIZES)
        rows = tables[path.parent].get(path.name)
        if isinstance(rows, bool) or not isinstance(rows, int):
            return None
        total += rows
    return total


def _sizes_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise DataError(f"{path} must be a JSON object of file name -> rows; mend it or delete it.")
    return found
