"""Every operation, to the bit, against Pillow and against the official TensorFlow code's formulas."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps

from saigen.nn import image_operations as ops
from tests.nn import tensorflow_formulas as official

FILL = (10, 128, 200)
FACTORS = (0.0, 0.1, 0.28, 0.5, 0.82, 1.0, 1.18, 1.72, 1.9, 5.14)
DEGREES = (0.0, 3.0, -9.0, 27.0, -30.0, 45.0, 84.0, 90.0, -90.0, 180.0, 123.4)
SHEARS = (0.0, 0.03, -0.27, 0.3, 0.84)
PIXELS = (0.0, 1.0, -1.0, 4.5, -4.5, 0.5, -0.5, 2.3, -17.49, 90.0)
PILLOW = {
    "AutoContrast": ((0.0,), lambda image, _: ImageOps.autocontrast(image)),
    "Equalize": ((0.0,), lambda image, _: ImageOps.equalize(image)),
    "Invert": ((0.0,), lambda image, _: ImageOps.invert(image)),
    "Posterize": (tuple(range(1, 9)), lambda image, bits: ImageOps.posterize(image, bits)),
    "Solarize": ((0, 1, 100, 128, 255, 256), lambda image, threshold: ImageOps.solarize(image, threshold)),
    "Color": (FACTORS, lambda image, factor: ImageEnhance.Color(image).enhance(factor)),
    "Contrast": (FACTORS, lambda image, factor: ImageEnhance.Contrast(image).enhance(factor)),
    "Brightness": (FACTORS, lambda image, factor: ImageEnhance.Brightness(image).enhance(factor)),
    "Sharpness": (FACTORS, lambda image, factor: ImageEnhance.Sharpness(image).enhance(factor)),
    "Rotate": (DEGREES, lambda image, degrees: image.rotate(degrees, fillcolor=FILL)),
    "ShearX": (SHEARS, lambda image, s: image.transform(image.size, Image.AFFINE, (1, s, 0, 0, 1, 0), fillcolor=FILL)),
    "ShearY": (SHEARS, lambda image, s: image.transform(image.size, Image.AFFINE, (1, 0, 0, s, 1, 0), fillcolor=FILL)),
    "TranslateX": (
        PIXELS,
        lambda image, p: image.transform(image.size, Image.AFFINE, (1, 0, p, 0, 1, 0), fillcolor=FILL),
    ),
    "TranslateY": (
        PIXELS,
        lambda image, p: image.transform(image.size, Image.AFFINE, (1, 0, 0, 0, 1, p), fillcolor=FILL),
    ),
}
OFFICIAL = {
    "AutoContrast": ((0.0,), lambda image, _: official.autocontrast(image)),
    "Equalize": ((0.0,), lambda image, _: official.equalize(image)),
    "Invert": ((0.0,), lambda image, _: official.invert(image)),
    "Posterize": (tuple(range(9)), official.posterize),
    "Solarize": ((0, 1, 128, 230, 256), official.solarize),
    "SolarizeAdd": ((0, 1, 99, 110, 308), official.solarize_add),
    "Color": (FACTORS, official.color),
    "Contrast": (FACTORS, official.contrast),
    "Brightness": (FACTORS, official.brightness),
    "Sharpness": ((0.0, 0.28, 1.0, 1.72), official.sharpness),
    "Rotate": (DEGREES, lambda image, degrees: official.rotate(image, degrees, FILL)),
    "ShearX": (SHEARS, lambda image, shear: official.shear_x(image, shear, FILL)),
    "ShearY": (SHEARS, lambda image, shear: official.shear_y(image, shear, FILL)),
    "TranslateX": (PIXELS, lambda image, pixels: official.translate_x(image, pixels, FILL)),
    "TranslateY": (PIXELS, lambda image, pixels: official.translate_y(image, pixels, FILL)),
}


def pictures(sizes):
    rng = np.random.default_rng(0)
    for h, w in sizes:
        yield rng.integers(0, 256, (h, w, 3)).astype(np.uint8)
        yield np.full((h, w, 3), 77, np.uint8)
        yield rng.integers(90, 120, (h, w, 3)).astype(np.uint8)
        y, x = np.mgrid[:h, :w]
        yield np.stack([127 + 100 * np.sin(x / 7 + i) * np.cos(y / 5) for i in range(3)], -1).astype(np.uint8)


def tensor(picture):
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


@pytest.mark.parametrize("name", PILLOW)
def test_equals_pillow_to_the_bit(name):
    arguments, reference = PILLOW[name]
    for picture in pictures([(32, 32), (33, 47), (96, 128), (5, 3), (17, 2)]):
        for argument in arguments:
            ours = ops.apply_operation(name, tensor(picture), argument, fill=FILL)
            theirs = tensor(reference(Image.fromarray(picture), argument))
            assert torch.equal(ours, theirs), (name, argument, picture.shape)


@pytest.mark.parametrize("name", OFFICIAL)
def test_equals_the_official_formulas_to_the_bit(name):
    arguments, reference = OFFICIAL[name]
    sizes = [(20, 20), (11, 26)] if name in (*ops.GEOMETRIC, "Sharpness") else [(20, 20), (11, 26), (300, 300)]
    for picture in pictures(sizes):
        for argument in arguments:
            ours = ops.apply_operation(name, tensor(picture), argument, fill=FILL, arithmetic="tensorflow")
            assert torch.equal(ours, tensor(reference(picture, argument))), (name, argument, picture.shape)


def test_official_contrast_is_the_number_of_pixels():
    """The quirk: a 224x224 picture is blended with level 196 whatever it shows, a 32x32 one with level 4."""
    for side, level in ((224, 196), (32, 4), (300, 255)):
        flat = ops.contrast(torch.zeros(3, side, side, dtype=torch.uint8), 0.0, arithmetic="tensorflow")
        assert flat.unique().tolist() == [level]


def test_cutout_equals_the_official_formula():
    picture = next(pictures([(20, 30)]))
    for half, row, column in [(0, 3, 3), (4, 0, 0), (4, 19, 29), (6, 10, 12), (36, 10, 10)]:
        ours = ops.cutout(tensor(picture), half, centre=torch.tensor([row, column]), fill=FILL)
        assert torch.equal(ours, tensor(official.cutout(picture, half, FILL, row, column)))


def test_cutout_centre_is_uniform_over_the_image():
    drawn = ops.cutout(torch.ones(20000, 1, 4, 5), 0.5, fill=0, generator=torch.Generator().manual_seed(0))
    holes = (drawn == 0).float().mean((0, 1))
    # A square of side 1 about (row, column) covers the pixel above and left of it, which at the border is outside.
    assert torch.allclose(holes, torch.full((4, 5), 1 / 20), atol=0.006)


@pytest.mark.parametrize("name", ops.OPERATIONS)
@pytest.mark.parametrize("arithmetic", ["pillow", "tensorflow"])
def test_a_batch_is_its_samples(name, arithmetic):
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (2, 3, 3, 17, 23), dtype=torch.uint8, generator=generator)
    arguments = torch.tensor([[1.0, 2.0, 0.3], [7.0, 1.72, 0.0]])
    whole = ops.apply_operation(
        name, images, arguments, arithmetic=arithmetic, generator=torch.Generator().manual_seed(1)
    )
    assert whole.shape == images.shape and whole.dtype == torch.uint8
    if name == "Cutout":
        return
    for i in range(2):
        for j in range(3):
            one = ops.apply_operation(name, images[i, j], arguments[i, j].item(), arithmetic=arithmetic)
            assert torch.equal(whole[i, j], one)


@pytest.mark.parametrize("name", ops.OPERATIONS)
def test_floats_act_on_eight_bits_and_inputs_stay(name):
    images = torch.randint(0, 256, (3, 3, 9, 9), dtype=torch.uint8)
    floats = images / 255
    before = floats.clone()
    result = ops.apply_operation(name, floats, 2.0, generator=torch.Generator().manual_seed(0))
    levels = ops.apply_operation(name, images, 2.0, generator=torch.Generator().manual_seed(0))
    assert result.dtype == torch.float32 and torch.equal(result, levels / 255)
    assert torch.equal(floats, before)
    assert ops.apply_operation(name, floats.bfloat16(), 2.0).dtype == torch.bfloat16


def test_closed_forms():
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    assert torch.equal(ops.invert(ops.invert(images)), images)
    assert torch.equal(ops.solarize(images, 256), images) and torch.equal(ops.solarize(images, 0), ops.invert(images))
    assert torch.equal(ops.posterize(images, 8), images) and torch.equal(ops.posterize(images, 11), images)
    assert ops.posterize(images, 0).max() == 0
    assert torch.equal(ops.rotate(ops.rotate(images, 90.0), -90.0), images)
    # One pixel of each level is flat already: equalize leaves it as it is.
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 16, 16)
    assert torch.equal(ops.equalize(ramp), ramp)
    grey = images[:, :1]
    assert torch.equal(ops.color(grey, 0.3), grey)


def test_wrong_arguments_are_named():
    images = torch.rand(2, 3, 8, 8)
    with pytest.raises(ValueError, match="name is 'Blur'"):
        ops.apply_operation("Blur", images)
    with pytest.raises(ValueError, match="channels, allowed are 1"):
        ops.color(torch.rand(2, 8, 8), 0.5)
    with pytest.raises(ValueError, match="fill is 300"):
        ops.rotate(images, 3.0, fill=300)
    with pytest.raises(ValueError, match="arithmetic is 'jax'"):
        ops.sharpness(images, 0.5, arithmetic="jax")
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        ops.brightness(images, torch.ones(3))
    with pytest.raises(ValueError, match="int64"):
        ops.invert(torch.zeros(1, 8, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="matrix has 1 rows"):
        ops.affine(images, torch.ones(1, 6))
