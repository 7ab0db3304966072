import io

import numpy as np
import pytest
from PIL import Image

from mm_moe.data import decode
from mm_moe.data.decode import UndecodableImageError, decode_image


def test_rgb_comes_back_as_it_was(png):
    image = decode_image(png((10, 20, 30)))
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (4, 4), (10, 20, 30))


def test_transparency_lies_on_white(png):
    assert decode_image(png((9, 9, 9, 0), mode="RGBA")).getpixel((0, 0)) == (255, 255, 255)
    # half of black over white: 255 * (1 - 128/255) = 127
    assert decode_image(png((0, 0, 0, 128), mode="RGBA")).getpixel((0, 0)) == (127, 127, 127)
    assert decode_image(png((0, 0), mode="LA")).getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([7, 8, 9])
    buffer = io.BytesIO()
    palette.save(buffer, "PNG", transparency=0)
    assert decode_image(buffer.getvalue()).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_are_scaled_not_clipped():
    buffer = io.BytesIO()
    Image.fromarray(np.full((2, 2), 0x4080, dtype=np.uint16)).save(buffer, "PNG")
    assert decode_image(buffer.getvalue()).getpixel((0, 0)) == (0x40, 0x40, 0x40)


def test_paths_and_urls(png, tmp_path):
    path = tmp_path / "x.png"
    path.write_bytes(png((1, 2, 3)))
    for place in (path, str(path), f"file://{path}"):
        assert decode_image(place).getpixel((0, 0)) == (1, 2, 3)


def test_truncated(noise_png):
    assert decode_image(noise_png).size == (32, 32)
    for keep in (len(noise_png) // 2, 40, 8):
        with pytest.raises(UndecodableImageError):
            decode_image(noise_png[:keep])


@pytest.mark.parametrize("payload", [b"hello", b"\x00" * 100, "no/such/file.png"])
def test_not_an_image(payload):
    with pytest.raises(UndecodableImageError):
        decode_image(payload)


def test_decompression_bomb(monkeypatch):
    # 9000 x 9000 black pixels are 10 kB of PNG and would be 243 MB of RGB
    buffer = io.BytesIO()
    Image.new("1", (9000, 9000)).save(buffer, "PNG")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("the bomb was opened"))
    with pytest.raises(UndecodableImageError, match="9000 x 9000 pixels"):
        decode_image(buffer.getvalue())


def test_a_huge_header_is_refused(png):
    # width and height stand at bytes 16-24 of a PNG; here 100,000 x 100,000
    small = png((0, 0, 0))
    with pytest.raises(UndecodableImageError):
        decode_image(small[:16] + (100_000).to_bytes(4, "big") * 2 + small[24:])


def test_no_format_that_starts_a_program():
    assert "EPS" not in decode.FORMATS
    with pytest.raises(UndecodableImageError):
        decode_image(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
