"""Data that `launch/prepare_data.py` wrote: checked Parquet shards with a record beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq

from mm_moe.batch import PackedArray, Sample
from mm_moe.data.events import EVENTS
from mm_moe.data.prepare.masked import VolumeReader
from mm_moe.data.reading import file_sha256, image_payload, reading, undecoded
from mm_moe.data.schema import VQA, DataSource
from mm_moe.errors import ConfigError, DataError

FORMAT = "mm_moe.prepared.v1"
INFO = "dataset_info.json"
SEQUENCE_KEYS = ("width", "length", "mean", "std", EVENTS)


class PreparedData(DataSource):
    """A prepared data set; everything about it stands in its `dataset_info.json`.

    Args:
        data_dir: the folder that `launch/prepare_data.py` made.

    Raises:
        ConfigError: no `data_dir`.
        DataError: no prepared data set is there, another one than the name says, or a shard is
            missing or was cut.
    """

    expected: str | None = None  # the name that the data must have

    def __init__(self, data_dir: str | None = None) -> None:
        super().__init__(data_dir)
        wanted = self.expected or "NAME"
        make = f"python launch/prepare_data.py {wanted} --source DOWNLOAD --output DIR"
        if self.data_dir is None:
            raise ConfigError(
                f"data set {self.expected or 'prepared'!r} needs data_dir: the folder that "
                f"`{make}` writes."
            )
        self.info = _read_info(self.data_dir, make)
        if self.expected not in (None, self.info["name"]):
            raise DataError(
                f"{self.data_dir} holds {self.info['name']!r}, not {self.expected!r}; take "
                f"--dataset {self.info['name']}."
            )
        self.name = self.info["name"]
        self.modalities = tuple(self.info["modalities"])
        self.label_names = tuple(self.info["label_names"])
        self.problem_type = self.info["problem_type"]
        self.task = self.info["task"]
        self.license = self.info["license"]
        self.unlabelled = dict(self.info["unlabelled"])
        self.private = bool(self.info.get("private", False))
        self.left_out = {
            f"{split}, quarantined: {reason}": count
            for split, record in self.info["splits"].items()
            for reason, count in record.get("reasons", {}).items()
        }
        self.sequences = {
            name: {key: about[key] for key in SEQUENCE_KEYS if key in about}
            for name, about in self.info["modalities"].items()
            if about["kind"] == "sequence"
        }
        self.array_shapes = {
            name: {key: about[key] for key in ("shape", "scale", "form") if key in about}
            for name, about in self.info["modalities"].items()
            if about["kind"] == "array"
        }
        self._check_files(self.data_dir)

    def _check_files(self, folder: Path) -> None:
        for record in self.info["splits"].values():
            for file in record["files"]:
                path = folder / file["name"]
                size = path.stat().st_size if path.is_file() else None
                if size != file["bytes"]:
                    found = "is not there" if size is None else f"has {size} bytes"
                    raise DataError(
                        f"{path} {found}, its record says {file['bytes']} bytes; prepare the data "
                        "again."
                    )

    def splits(self) -> tuple[str, ...]:
        """The splits that were written."""
        return tuple(self.info["splits"])

    def stream(self, split: str) -> datasets.IterableDataset:
        """Rows of a split, one shard after the other."""
        files = list(map(str, self._shards(split)))
        stream = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
        return undecoded(stream)

    def index(self, split: str) -> Iterator[Sample]:
        """Ids, groups and labels; no payload is read."""
        for path in self._shards(split):
            with reading(str(path)):
                known = pq.read_schema(path).names  # older files have no mask_key
                columns = [name for name in ("id", "group", "mask_key", "label") if name in known]
                rows = pq.read_table(path, columns=columns).to_pylist()
            for row in rows:
                yield self._sample(row, {})

    def _shards(self, split: str) -> list[Path]:
        record = self.info["splits"][self.check_split(split)]
        return [Path(str(self.data_dir), file["name"]) for file in record["files"]]

    def to_sample(self, row: dict[str, Any]) -> Sample:
        """Encoded images, texts, sequences as their float32 bytes, and packed arrays."""
        cells = {name: self._payload(name, row[name]) for name in self._kinds}
        payload = {name: value for name, value in cells.items() if value}
        return self._sample(row, payload)

    def _sample(self, row: dict[str, Any], payload: dict[str, Any]) -> Sample:
        key = row.get("mask_key") or ""
        return Sample(row["id"], payload, self._label(row), group=row["group"], mask_key=key)

    def _label(self, row: dict[str, Any]) -> Any:
        """The label; soft targets as {class: share}."""
        if self.task != VQA or row["label"] is None:
            return row["label"]
        return {entry["class"]: entry["share"] for entry in row["label"]}

    def _payload(self, name: str, cell: Any) -> Any:
        if self._kinds[name] == "image":
            return image_payload(cell)
        if self._kinds[name] == "array" and cell is not None:
            about = self.info["modalities"][name]
            if "mask" in about:
                return self._volumes[name](cell)
            return PackedArray(cell, about["dtype"], tuple(about["shape"]))
        return cell

    @cached_property
    def _volumes(self) -> dict[str, VolumeReader]:
        folder, about = Path(str(self.data_dir)), self.info["modalities"]
        return {name: VolumeReader(folder, form) for name, form in about.items() if "mask" in form}

    @cached_property
    def _kinds(self) -> dict[str, str]:
        return {name: record["kind"] for name, record in self.info["modalities"].items()}

    def size(self, split: str) -> int:
        """Rows of a split."""
        return self.info["splits"][self.check_split(split)]["rows"]

    def fingerprint(self) -> str:
        """sha256 of the record, which holds that of every shard."""
        return file_sha256(Path(str(self.data_dir), INFO))


class MmImdbData(PreparedData):
    """MM-IMDb, prepared."""

    expected = "mm_imdb"


class Food101Data(PreparedData):
    """UPMC Food-101, prepared."""

    expected = "food101"


class HatefulMemesData(PreparedData):
    """Hateful Memes, prepared."""

    expected = "hateful_memes"


class CmuMosiData(PreparedData):
    """CMU-MOSI, prepared."""

    expected = "cmu_mosi"


class CmuMoseiData(PreparedData):
    """CMU-MOSEI, prepared."""

    expected = "cmu_mosei"


class ChSimsData(PreparedData):
    """CH-SIMS, prepared."""

    expected = "ch_sims"


class IemocapData(PreparedData):
    """IEMOCAP, one fold, prepared."""

    expected = "iemocap"


class MimicImpkData(PreparedData):
    """MIMIC-III's im.pk, one task, prepared."""

    expected = "mimic_impk"


class MmsdData(PreparedData):
    """MMSD2.0, prepared."""

    expected = "mmsd"


class MustardData(PreparedData):
    """MUStARD, prepared."""

    expected = "mustard"


class UrfunnyData(PreparedData):
    """UR-FUNNY, prepared."""

    expected = "urfunny"


class AvMnistData(PreparedData):
    """AV-MNIST from written and spoken digits, prepared."""

    expected = "av_mnist"


class AvMnistNpyData(PreparedData):
    """AV-MNIST's published arrays, prepared."""

    expected = "avmnist_npy"


class DigitPairsData(PreparedData):
    """Written and spoken digits in pairs, prepared."""

    expected = "digit_pairs"


class FastmriKneeData(PreparedData):
    """fastMRI knee slices, magnitude and phase, prepared."""

    expected = "fastmri_knee"


class VqaV2Data(PreparedData):
    """VQA v2, prepared."""

    expected = "vqa_v2"


class VqaVsData(PreparedData):
    """VQA-VS with its nine sets out of distribution, prepared."""

    expected = "vqa_vs"


class Nlvr2Data(PreparedData):
    """NLVR2, two photos and a sentence, prepared."""

    expected = "nlvr2"


class AdniData(PreparedData):
    """ADNI: grey matter, genotypes, clinical data and biospecimens, prepared."""

    expected = "adni"


class TablesData(PreparedData):
    """Tables of patients with a schema file, prepared."""

    expected = "tables"


class Mimic3Data(PreparedData):
    """MIMIC-III's tables: static values, vitals, laboratory, earlier codes, notes, prepared."""

    expected = "mimic3"


class Mimic4Data(PreparedData):
    """MIMIC-IV's tables, prepared."""

    expected = "mimic4"


class EicuData(PreparedData):
    """eICU's tables, prepared."""

    expected = "eicu"


class MimicTensorsData(PreparedData):
    """MIMIC as vectors of laboratory, notes and codes, prepared."""

    expected = "mimic_tensors"


def _read_info(folder: Path, make: str) -> dict[str, Any]:
    """The record of a prepared data set."""
    path = folder / INFO
    if not path.is_file():
        raise DataError(f"there is no {path}; make it with `{make}`.")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        version = info["format"]
        keys = ("name", "modalities", "label_names", "problem_type", "task", "license", "splits")
        lost = [key for key in (*keys, "unlabelled") if key not in info]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no record of a prepared data set; prepare it again.") from error
    if version != FORMAT or lost:
        raise DataError(
            f"{path} has format {version!r}, this version reads {FORMAT!r}; prepare it again."
        )
    return info
