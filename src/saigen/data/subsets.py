"""Parts of a set of images."""

import numpy as np

from saigen.data.images import Images, split


def sample(images: Images, count: int | None, rng: np.random.Generator) -> Images:
    """``count`` of ``images``, drawn so that the classes keep their shares; None, or more than there are: all, shuffled.

    >>> from saigen.data import digits
    >>> len(sample(digits(), 100, np.random.default_rng(0)))
    100
    """
    count = len(images) if count is None else min(count, len(images))
    return images.subset(split(images.y.numpy(), (count,), rng)[0])
