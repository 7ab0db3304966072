import io
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))  # the toy data set beside these tests


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Nothing in these tests may need the network."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


@pytest.fixture
def png():
    """A function (mode, size, colour) -> encoded PNG."""

    def encode(colour, *, mode="RGB", size=(4, 4), format="PNG"):
        buffer = io.BytesIO()
        Image.new(mode, size, colour).save(buffer, format)
        return buffer.getvalue()

    return encode


@pytest.fixture
def noise_png():
    """A PNG that does not compress, to be truncated."""
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()
