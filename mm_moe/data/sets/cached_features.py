"""Frozen features of another data set, as `launch/prepare_data.py features` wrote them."""

from __future__ import annotations

from mm_moe.data.sets.prepared import PreparedData
from mm_moe.errors import DataError


class CachedFeaturesData(PreparedData):
    """Vectors instead of images and texts; everything else is that of the data they are made of.

    Its name is that of the first data set, and ids and groups are kept: a missing mask takes the
    same modalities from the same samples. For `--backbone features`.

    Args:
        data_dir: the folder that the program wrote.

    Raises:
        ConfigError: no `data_dir`.
        DataError: as `PreparedData`, or a prepared data set that holds no features.
    """

    def __init__(self, data_dir: str | None = None) -> None:
        super().__init__(data_dir)
        if "backbone_sha256" not in self.info.get("options", {}):
            raise DataError(
                f"{self.data_dir} holds {self.name!r} itself and no features of it; take --dataset "
                f"{self.name}, or make features with `python launch/prepare_data.py features`."
            )

    @property
    def backbone_sha256(self) -> str:
        """Hash of the backbone's weights and settings."""
        return self.info["options"]["backbone_sha256"]
