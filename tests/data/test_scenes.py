"""Rendered scenes: pure functions of their generator, with labels that are the truth."""

import numpy as np
import pytest

from saigen.data.scenes import CLASSES, render_scenes


def test_the_same_generator_gives_the_same_scenes():
    first = render_scenes(np.random.default_rng(3), 4, (40, 60))
    again = render_scenes(np.random.default_rng(3), 4, (40, 60))
    other = render_scenes(np.random.default_rng(4), 4, (40, 60))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not np.array_equal(first[1], other[1])
    images, labels = first
    assert images.shape == (4, 3, 40, 60) and images.dtype == np.float32
    assert images.min() >= 0 and images.max() <= 1
    assert labels.shape == (4, 40, 60) and set(np.unique(labels)) <= set(range(len(CLASSES)))


def test_shapes_have_their_areas_and_extents():
    """One object of a known radius: a disc, bar and square all cover pi r^2, and are as long as they should be."""
    _, labels = render_scenes(np.random.default_rng(0), 400, 120, objects=1, radius=(10, 10))
    extents = {1: [], 2: [], 3: []}
    for label in labels:
        kind = label.max()
        rows, columns = np.nonzero(label)
        if not kind or min(rows.min(), columns.min()) == 0 or max(rows.max(), columns.max()) == 119:
            continue  # cut by the border
        assert (label > 0).sum() == pytest.approx(np.pi * 100, rel=0.06)
        centred = np.stack([rows - rows.mean(), columns - columns.mean()])
        extents[kind].append(2 * np.abs(np.hypot(*centred)).max())
    assert min(map(len, extents.values())) > 20
    side = np.sqrt(np.pi) * 10
    for kind, longest in ((1, 20), (2, np.hypot(2 * side, side / 2)), (3, side * np.sqrt(2))):
        assert np.median(extents[kind]) == pytest.approx(longest, abs=2)


def test_objects_are_lighter_than_the_background_and_colour_does_not_tell_the_class():
    images, labels = render_scenes(np.random.default_rng(1), 200, 96, noise=0.0)
    light = images.mean(1)
    means = [light[labels == k].mean() for k in range(4)]
    assert means[0] < 0.4 < min(means[1:])
    assert max(means[1:]) - min(means[1:]) < 0.02


def test_wrong_sizes():
    with pytest.raises(ValueError, match="count"):
        render_scenes(np.random.default_rng(0), 0)
