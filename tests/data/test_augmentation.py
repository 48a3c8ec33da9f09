"""The augmentations keep shapes, labels and colours, and are a function of the generator."""

import pytest
import torch

from saigen.data import crop_and_flip, shift_and_flip, standardised


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("augment", [shift_and_flip, crop_and_flip])
def test_a_function_of_the_generator_that_keeps_shape_and_labels(augment):
    x = torch.randint(256, (6, 3, 16, 16), generator=seeded(), dtype=torch.uint8)
    y = torch.arange(6)
    once, labels = augment(seeded(1), x, y)
    again, _ = augment(seeded(1), x, y)
    other, _ = augment(seeded(2), x, y)
    assert once.shape == x.shape and once.dtype == torch.float32 and torch.equal(labels, y)
    assert torch.equal(once, again) and not torch.equal(once, other)


def test_shifted_images_hold_the_pixels_of_their_own_image():
    x = torch.arange(4.0)[:, None, None, None] + torch.linspace(0, 0.5, 64).view(1, 1, 8, 8)
    shifted, _ = shift_and_flip(seeded(), x, torch.arange(4))
    assert torch.equal(shifted.flatten(1).floor(), torch.arange(4.0)[:, None].expand(4, 64))
    middles = x[:, :, 3:5, 3:5].flatten(1)
    for image, middle in zip(shifted, middles, strict=True):
        assert torch.isin(middle, image).all()  # no shift of one pixel loses the middle


def test_bytes_are_standardised_and_floats_left_alone():
    x = torch.tensor([0, 255], dtype=torch.uint8)
    assert standardised(x).tolist() == pytest.approx([-1.8, 2.2])
    assert standardised(torch.tensor([7.0])).item() == 7.0
