"""Rendered scenes with known truth: discs, bars and squares on a textured background, for segmentation.

Surfaces carry gratings. All objects of a scene have one surface, lighter than the background's: neither colour nor
texture tells a disc from a bar from a square, nor an object from its neighbour; only what lies where does. The light
falls off across a scene and the sensor is noisy.
"""

import numpy as np

from saigen.data.images import fingerprint

CLASSES = ("background", "disc", "bar", "square")


def render_scenes(
    rng: np.random.Generator,
    count: int,
    size: int | tuple[int, int] = 160,
    *,
    objects: int = 12,
    radius: tuple[float, float] = (8.0, 16.0),
    clutter: float = 0.3,
    noise: float = 0.04,
) -> tuple[np.ndarray, np.ndarray]:
    """``count`` scenes and their labels: ``(count, 3, h, w)`` float32 in [0, 1] and ``(count, h, w)`` uint8.

    ``objects`` shapes a scene, later ones in front, each covering about the area of a disc of a ``radius`` drawn from the
    given range in pixels: a disc, a bar four times as long as wide, or a square, the last two turned by any angle.
    ``clutter`` is the contrast of the background's texture beside the objects', in [0, 1], and ``noise`` the standard
    deviation of each pixel's noise. The same ``rng`` gives the same scenes.

    >>> images, labels = render_scenes(np.random.default_rng(0), 2, 64)
    >>> images.shape, labels.shape
    ((2, 3, 64, 64), (2, 64, 64))
    """
    h, w = (size, size) if isinstance(size, int) else size
    if count < 1 or min(h, w) < 1 or objects < 0:
        raise ValueError(f"count, size and objects are {count}, {size} and {objects}, allowed are 1, 1 and 0 or more")
    y, x = (axis.astype(np.float32)[None] for axis in np.mgrid[:h, :w])
    images = _surface(rng, count, y, x, 0.1, 0.5, clutter)
    labels = np.zeros((count, h, w), np.uint8)
    surface = _surface(rng, count, y, x, 0.5, 0.9)
    for _ in range(objects):
        kind = rng.integers(1, len(CLASSES), count)
        cy, cx = _draw(rng, count, 0, h), _draw(rng, count, 0, w)
        angle, r = _draw(rng, count, 0, np.pi), _draw(rng, count, *radius)
        along = (x - cx) * np.cos(angle) + (y - cy) * np.sin(angle)
        across = (y - cy) * np.cos(angle) - (x - cx) * np.sin(angle)
        # Half the sides of a bar and of a square that have the area pi r^2 of the disc.
        bar, square = np.sqrt(np.pi) * r, np.sqrt(np.pi) / 2 * r
        inside = np.select(
            [np.broadcast_to(kind[:, None, None] == k, labels.shape) for k in (1, 2, 3)],
            [
                along**2 + across**2 <= r**2,
                (np.abs(along) <= bar) & (np.abs(across) <= bar / 4),
                np.maximum(np.abs(along), np.abs(across)) <= square,
            ],
        ).astype(bool)
        images = np.where(inside[:, None], surface, images)
        labels = np.where(inside, kind[:, None, None], labels).astype(np.uint8)
    slope = _draw(rng, count, 0, 2 * np.pi)
    ramp = (x / w - 0.5) * np.cos(slope) + (y / h - 0.5) * np.sin(slope)
    light = 1.0 + 0.3 * ramp[:, None]
    images = images * light + noise * rng.standard_normal(images.shape, dtype=np.float32)
    return np.clip(images, 0.0, 1.0).astype(np.float32), labels


def scenes_fingerprint(images: np.ndarray, labels: np.ndarray) -> str:
    """What a measurement notes of rendered scenes: SHA-256 over pixels and labels."""
    return fingerprint([images, labels])


def _draw(rng: np.random.Generator, count: int, low: float, high: float) -> np.ndarray:
    return rng.uniform(low, high, (count, 1, 1)).astype(np.float32)


def _surface(
    rng: np.random.Generator, count: int, y: np.ndarray, x: np.ndarray, low: float, high: float, contrast: float = 1.0
) -> np.ndarray:
    """A grating between two colours from ``low`` to ``high``, its direction, phase and period (4 to 12 pixels) random."""
    direction, phase = _draw(rng, count, 0, np.pi), _draw(rng, count, 0, 2 * np.pi)
    frequency = 2 * np.pi / _draw(rng, count, 4, 12)
    wave = 0.5 + 0.5 * np.sin(frequency * (x * np.cos(direction) + y * np.sin(direction)) + phase)
    first, second = rng.uniform(low, high, (2, count, 3, 1, 1)).astype(np.float32)
    return first + contrast * (second - first) * wave[:, None]
