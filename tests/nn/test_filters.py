"""Filters beside SciPy and Pillow."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from saigen.nn.filters import box_resize, gaussian_filter, jpeg, pad, reflect, sample

SCIPY = {"edge": "nearest", "repeat": "reflect", "mirror": "mirror"}


def draw(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("border", SCIPY)
@pytest.mark.parametrize("sigma", (0.1, 0.7, 3.0, 9.0))
def test_gaussian_filter_equals_scipy(border, sigma):
    x = draw(2, 11, 8)
    expected = [ndimage.gaussian_filter(image, sigma, mode=SCIPY[border], truncate=3.0) for image in x.numpy()]
    np.testing.assert_allclose(gaussian_filter(x, sigma, border, 3.0), np.stack(expected), atol=1e-12)


@pytest.mark.parametrize("border", SCIPY)
def test_sampling_and_padding_equal_scipy(border):
    x, places = draw(2, 3, 7, 5), 20 * draw(2, 2, 7, 5) - 7
    done = sample(x, places[0], places[1], border)
    for b in range(2):
        for c in range(3):
            expected = ndimage.map_coordinates(x[b, c].numpy(), places[:, b].numpy(), order=1, mode=SCIPY[border])
            np.testing.assert_allclose(done[b, c], expected, atol=1e-12)
    rows, columns = np.mgrid[-9:16, -9:14]
    padded = ndimage.map_coordinates(x[0, 0].numpy(), (rows, columns), order=1, mode=SCIPY[border])
    np.testing.assert_allclose(pad(x, 9, border)[0, 0], padded, atol=1e-12)
    with pytest.raises(ValueError, match="border"):
        reflect(np.arange(3), 3, "wrap")


@pytest.mark.parametrize("size", ((5, 4), (13, 9), (20, 31), (1, 1)))
def test_box_resize_equals_pillow(size):
    levels = (255 * draw(13, 9)).round()
    expected = Image.fromarray(levels.numpy().astype(np.uint8)).resize(size[::-1], Image.Resampling.BOX)
    np.testing.assert_array_equal(box_resize(levels, size), np.asarray(expected))


@pytest.mark.parametrize("channels", (1, 3))
def test_jpeg_equals_pillow(channels):
    levels = (255 * draw(2, channels, 17, 10)).round().byte()
    for image, done in zip(levels.permute(0, 2, 3, 1).numpy(), jpeg(levels, 20), strict=True):
        file = io.BytesIO()
        Image.fromarray(image.squeeze()).save(file, "JPEG", quality=20)
        np.testing.assert_array_equal(done.permute(1, 2, 0).squeeze(), np.asarray(Image.open(file)))
    with pytest.raises(ValueError, match="channels"):
        jpeg(torch.zeros(1, 2, 8, 8, dtype=torch.uint8), 20)
