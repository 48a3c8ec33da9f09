"""Long tails and steps: the published sizes, parts of the right size, and sentences for what cannot be had."""

import numpy as np
import pytest
import torch

from saigen.data.imbalance import balanced_parts, class_counts, imbalanced_indices, long_tailed_counts, step_counts


@pytest.mark.parametrize(
    ("classes", "largest", "factor", "total"),
    [
        (10, 5000, 200, 11_203), (10, 5000, 100, 12_406), (10, 5000, 50, 13_996), (10, 5000, 20, 17_023),
        (10, 5000, 10, 20_431), (100, 500, 200, 9_502), (100, 500, 100, 10_847), (100, 500, 50, 12_608),
        (100, 500, 20, 15_907), (100, 500, 10, 19_573),
    ],
)  # fmt: skip
def test_totals_of_long_tailed_cifar(classes, largest, factor, total):
    counts = long_tailed_counts(classes, largest, factor)
    assert counts.sum() == total
    # the official code's expression, number by number
    assert counts.tolist() == [int(largest * ((1 / factor) ** (c / (classes - 1.0)))) for c in range(classes)]


def test_counts():
    assert long_tailed_counts(10, 5000, 100).tolist() == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert long_tailed_counts(4, 7, 1).tolist() == [7, 7, 7, 7] and long_tailed_counts(1, 9, 3).tolist() == [9]
    assert long_tailed_counts(3, 4900, 49)[-1] == 100  # int(4900 * (1 / 49)) is 99
    assert step_counts(10, 5000, 100).tolist() == [5000] * 5 + [50] * 5
    assert step_counts(5, 60, 10, minority=0.2).tolist() == [60] * 4 + [6]


@pytest.mark.parametrize("kind", [list, np.asarray, torch.as_tensor])
def test_a_part_has_the_counts_and_draws_are_the_generators(kind):
    y = np.random.default_rng(0).permutation(np.repeat(np.arange(5), [40, 30, 50, 60, 35]))
    counts = np.array([3, 30, 0, 17, 8])
    part = imbalanced_indices(kind(y.tolist()), counts, np.random.default_rng(1))
    assert np.bincount(y[part], minlength=5).tolist() == counts.tolist() and len(set(part)) == len(part)
    assert (part == imbalanced_indices(y, counts, np.random.default_rng(1))).all()
    assert set(part) != set(imbalanced_indices(y, counts, np.random.default_rng(2)))
    # in random order, and every sample of a class has its chance
    assert (np.diff(y[part]) < 0).any()
    assert set(np.concatenate([imbalanced_indices(y, counts, np.random.default_rng(s)) for s in range(200)])) == set(
        np.flatnonzero(y != 2)
    )


def test_stronger_imbalance_is_a_part_of_weaker():
    y = np.repeat(np.arange(10), 100)
    weak, strong = (
        imbalanced_indices(y, long_tailed_counts(10, 100, factor), np.random.default_rng(3)) for factor in (10, 100)
    )
    assert set(strong) < set(weak)


def test_balanced_parts():
    y = np.repeat(np.arange(4), [9, 7, 8, 30])
    parts = balanced_parts(torch.from_numpy(y), 4, (2, 5), np.random.default_rng(0))
    assert [np.bincount(y[part]).tolist() for part in parts] == [[2] * 4, [5] * 4]
    assert len(set(np.concatenate(parts))) == 28
    with pytest.raises(ValueError, match=r"counts\[1\] is 6, allowed are at most 5"):
        balanced_parts(y, 4, (2, 6), np.random.default_rng(0))


def test_class_counts():
    assert class_counts(torch.tensor([0, 2, 1, 2]), 3).tolist() == [1, 1, 2]
    with pytest.raises(ValueError, match="class 1 has no sample"):
        class_counts([0, 2, 2], 3)
    with pytest.raises(ValueError, match=r"y\[1\] is 3, allowed are classes from 0 to 2"):
        class_counts([0, 3, 2], 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: long_tailed_counts(0, 10, 2), "num_classes is 0"),
        (lambda: long_tailed_counts(10, 0, 2), "largest is 0"),
        (lambda: long_tailed_counts(10, 100, 0.5), "factor is 0.5"),
        (lambda: long_tailed_counts(10, 100, float("nan")), "factor is nan"),
        (lambda: long_tailed_counts(10, 100, 200), "leaves class 8 without a sample"),
        (lambda: step_counts(10, 100, 200), "leaves class 5 without a sample"),
        (lambda: step_counts(10, 100, 10, minority=1.0), "minority is 1.0"),
        (lambda: imbalanced_indices([0, 1, 1], [2, 1], np.random.default_rng(0)), r"counts\[0\] is 2, allowed are at most 1"),
        (lambda: imbalanced_indices([0, 1, -1], [1, 1], np.random.default_rng(0)), r"y\[2\] is -1"),
        (lambda: imbalanced_indices([0, 1], [0.5, 1], np.random.default_rng(0)), "counts is"),
        (lambda: imbalanced_indices([0.0, 1.0], [1, 1], np.random.default_rng(0)), "type float64"),
        (lambda: imbalanced_indices([], [1, 1], np.random.default_rng(0)), "one or more"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
