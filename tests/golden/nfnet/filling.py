"""Parameters and inputs as a pure function of their name and shape, so that the golden file holds answers only."""

import zlib

import numpy as np
from numpy.typing import NDArray


def filled(name: str, shape: tuple[int, ...], scale: float = 1.0) -> NDArray[np.float32]:
    """Normal numbers from NumPy's legacy generator, whose stream is frozen, seeded by the name."""
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    return (values * scale).astype(np.float32)


def parameter(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Kernels at their initial size; gains around 1, biases around 0, skip gains well off 0."""
    kind = name.rpartition("/")[2]
    if kind == "skip_gain":
        return np.abs(filled(name, shape)) + np.float32(0.5)
    if kind == "gain":
        return 1 + filled(name, shape, 0.2)
    if kind in ("bias", "b"):
        return filled(name, shape, 0.2)
    return filled(name, shape, float(np.prod(shape[:-1])) ** -0.5)


# name of the case: the official class, and our depths and widths
CASES = {
    "NFNet": ((1, 2, 1, 1), (32, 48, 64, 64)),
    "NF_ResNet": ((1, 2, 1, 1), (64, 128, 256, 512)),
    "NF_RegNet": ((1, 2, 1, 1), (24, 32, 48, 56)),
}
SIDE = 67  # odd, so that every padding shows
STEPS = 3
