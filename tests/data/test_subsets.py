"""A sample keeps the classes' shares and never asks for more than there is."""

import numpy as np

from saigen.data import digits
from saigen.data.subsets import sample


def test_shares_are_kept_and_draws_are_the_generators():
    images = digits()
    part = sample(images, 900, np.random.default_rng(0))
    assert np.abs(np.bincount(part.y) - np.bincount(images.y) * 900 / len(images)).max() <= 1
    again = sample(images, 900, np.random.default_rng(0))
    assert (part.y == again.y).all() and not (part.y == sample(images, 900, np.random.default_rng(1)).y).all()


def test_none_and_too_many_are_all():
    images = digits()
    for count in (None, 10_000):
        found = sample(images, count, np.random.default_rng(0))
        assert len(found) == len(images) and np.bincount(found.y).tolist() == np.bincount(images.y).tolist()
