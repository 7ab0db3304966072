import numpy as np
import pytest

from mm_moe.data.kspace import (
    add_noise,
    centre_crop,
    centred_image,
    fill_columns,
    magnitude_and_phase,
    root_sum_of_squares,
)
from tests.contract.test_datasets import shared_data


def by_hand(kspace_YX):
    """The image as a sum over frequencies, both counted from the middle."""
    rows, columns = kspace_YX.shape
    y, x = np.arange(rows) - rows // 2, np.arange(columns) - columns // 2
    waves_y = np.exp(2j * np.pi * np.outer(y, y) / rows)
    waves_x = np.exp(2j * np.pi * np.outer(x, x) / columns)
    return waves_y @ kspace_YX @ waves_x.T / np.sqrt(rows * columns)


@pytest.mark.parametrize("shape", [(4, 6), (5, 3)])
def test_the_centred_transform_is_the_sum_over_frequencies(shape):
    rng = np.random.default_rng(0)
    kspace = rng.normal(size=shape) + 1j * rng.normal(size=shape)
    image = centred_image(kspace)
    assert np.allclose(image, by_hand(kspace))
    assert np.square(np.abs(image)).sum() == pytest.approx(np.square(np.abs(kspace)).sum())


def test_one_frequency_in_the_middle_is_a_flat_image():
    kspace = np.zeros((4, 4), complex)
    kspace[2, 2] = 4j
    magnitude, phase = magnitude_and_phase(centred_image(kspace), 2)
    assert np.allclose(magnitude, 1)  # 4 / sqrt(16)
    assert np.allclose(phase, np.pi / 2)


def test_columns_are_filled_on_both_sides():
    filled, measured = fill_columns(np.ones((2, 3)), 6)
    assert filled.tolist() == [[0, 1, 1, 1, 0, 0]] * 2
    assert measured.tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="more than 2"):
        fill_columns(np.ones((2, 3)), 2)


def test_the_middle_of_an_image():
    assert centre_crop(np.arange(20).reshape(4, 5), 2).tolist() == [[6, 7], [11, 12]]
    with pytest.raises(ValueError, match="no 5 x 5 middle"):
        centre_crop(np.zeros((4, 5)), 5)


def test_noise_is_a_share_of_the_largest_magnitude_and_the_same_again():
    image = np.full((200, 200), 3 + 4j)  # magnitude 5
    noise = add_noise(image, percent=10, seed=1) - image
    assert noise.real.std() == pytest.approx(0.5, rel=0.05)
    assert noise.imag.std() == pytest.approx(0.5, rel=0.05)
    assert np.array_equal(add_noise(image, percent=10, seed=1) - image, noise)


def test_real_coils_by_hand():
    kspace = np.load(shared_data() / "kspace" / "cartesian_13coil.npz")["kspace"]
    images = centred_image(kspace)
    assert images.shape == (13, 224, 224)
    for coil in (0, 12):
        assert np.allclose(images[coil], by_hand(kspace[coil]), atol=1e-5 * np.abs(images).max())
    magnitude, phase = magnitude_and_phase(images[3], 160)
    middle = images[3, 32:192, 32:192]
    assert np.allclose(magnitude * np.exp(1j * phase), middle, atol=1e-5 * magnitude.max())
    combined = root_sum_of_squares(images)
    assert np.allclose(combined**2, sum(np.abs(image) ** 2 for image in images), rtol=1e-4)
    energy = np.square(np.abs(kspace.astype(complex))).sum()
    assert np.square(combined.astype(float)).sum() == pytest.approx(energy, rel=1e-5)
