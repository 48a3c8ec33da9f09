"""Imbalanced parts of any labelled set: long tails (exponential) and steps, by the formulas the literature shares.

The imbalance factor is the size of the largest class over that of the smallest. The long tail is that of Cui et al. (2019,
arXiv 1901.05555): n_c = n_max (1 / factor)^(c / (C - 1)), cut to whole numbers. The step is that of Buda et al. (2018,
arXiv 1710.05381): a share of the classes has n_max / factor samples, the others n_max.

>>> counts = long_tailed_counts(10, 5000, factor=100)
>>> counts.tolist()
[5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
>>> y = np.repeat(np.arange(10), 6000)
>>> np.bincount(y[imbalanced_indices(y, counts, np.random.default_rng(0))]).tolist() == counts.tolist()
True
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

Labels = Sequence[int] | np.ndarray | Tensor


@dataclass(frozen=True)
class ImbalancedSets:
    """What a comparison under imbalance needs: an imbalanced training set, balanced validation and test sets."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    counts: np.ndarray
    """Training samples of every class."""


def long_tailed_counts(num_classes: int, largest: int, factor: float) -> np.ndarray:
    """Samples of each class, (num_classes,) int64, falling exponentially from ``largest`` to ``largest / factor``.

    Raises ``ValueError`` where an argument is out of range or a class would be left without a sample.
    """
    _check(num_classes, largest, factor)
    place = np.arange(num_classes) / max(1, num_classes - 1)
    return _whole(largest * (1.0 / factor) ** place, largest, factor)


def step_counts(num_classes: int, largest: int, factor: float, minority: float = 0.5) -> np.ndarray:
    """Samples of each class, (num_classes,) int64: the last ``minority`` of the classes has ``largest / factor`` samples.

    Raises ``ValueError`` where an argument is out of range or a class would be left without a sample.
    """
    _check(num_classes, largest, factor)
    if not 0 < minority < 1:
        raise ValueError(f"minority is {minority}, allowed is a share of the classes with 0 < minority < 1")
    few = np.arange(num_classes) >= num_classes - round(minority * num_classes)
    return _whole(np.where(few, largest * (1.0 / factor), float(largest)), largest, factor)


def class_counts(y: Labels, num_classes: int) -> np.ndarray:
    """Samples of each class of the labels ``y``, (num_classes,) int64.

    Raises ``ValueError`` naming the row of a label outside 0 to ``num_classes`` - 1, or the class without a sample.
    """
    labels = _labels(y, num_classes)
    counts = np.bincount(labels, minlength=num_classes)
    if (counts == 0).any():
        raise ValueError(
            f"class {int(np.flatnonzero(counts == 0)[0])} has no sample among the {len(labels)} labels, allowed are at "
            f"least one of each of the {num_classes} classes"
        )
    return counts


def imbalanced_indices(y: Labels, counts: Sequence[int] | np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Indices of a random part of ``y`` that holds ``counts[c]`` samples of every class c, in random order.

    To make another class the largest, permute ``counts``. For the same ``rng`` a part with smaller counts lies within
    one with larger counts, so that imbalances are compared on the same samples.
    Raises ``ValueError`` naming the class that has too few samples, or the row of a label outside the range.
    """
    wanted = np.asarray(counts)
    if wanted.ndim != 1 or len(wanted) < 1 or not np.issubdtype(wanted.dtype, np.integer) or wanted.min() < 0:
        raise ValueError(f"counts is {counts}, allowed are whole numbers of at least 0, one a class")
    labels = _labels(y, len(wanted))
    order = rng.permutation(len(labels))
    # The place of every sample among those of its class, in the random order.
    by_class = np.argsort(labels[order], kind="stable")
    sizes = np.bincount(labels, minlength=len(wanted))
    short = np.flatnonzero(sizes < wanted)
    if len(short):
        c = int(short[0])
        raise ValueError(f"counts[{c}] is {wanted[c]}, allowed are at most {sizes[c]}, the samples of class {c}")
    rank = np.empty(len(labels), np.int64)
    rank[by_class] = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return order[rank < wanted[labels[order]]]


def balanced_parts(
    y: Labels, num_classes: int, sizes: Sequence[int], rng: np.random.Generator
) -> tuple[np.ndarray, ...]:
    """Disjoint random index arrays; the i-th holds ``sizes[i]`` samples of every class of ``y``, in random order.

    >>> [len(part) for part in balanced_parts([0, 1] * 10, 2, (3, 4), np.random.default_rng(0))]
    [6, 8]
    """
    labels, left, parts = _labels(y, num_classes), np.arange(len(y)), []
    for size in sizes:
        chosen = imbalanced_indices(labels[left], [size] * num_classes, rng)
        parts.append(left[chosen])
        left = np.delete(left, chosen)
    return tuple(parts)


def _check(num_classes: int, largest: int, factor: float) -> None:
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}, allowed is num_classes >= 1")
    if largest < 1:
        raise ValueError(f"largest is {largest}, allowed is a number of samples of at least 1")
    if not 1 <= factor < float("inf"):
        raise ValueError(f"factor is {factor}, allowed is the largest class over the smallest, at least 1")


def _whole(counts: np.ndarray, largest: int, factor: float) -> np.ndarray:
    # 4900 * (1 / 49) is a hair under 100: what rounding took away does not cost a sample.
    whole = np.floor(counts * (1 + 1e-12)).astype(np.int64)
    if whole.min() < 1:
        raise ValueError(
            f"factor is {factor} with largest {largest}, which leaves class {int(np.flatnonzero(whole < 1)[0])} without a "
            f"sample: allowed is factor <= largest"
        )
    return whole


def _labels(y: Labels, num_classes: int) -> np.ndarray:
    labels = np.asarray(y)
    if labels.ndim != 1 or len(labels) == 0 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"y has shape {labels.shape} and type {labels.dtype}, allowed are one or more whole numbers in one dimension"
        )
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(wrong):
        raise ValueError(f"y[{wrong[0]}] is {labels[wrong[0]]}, allowed are classes from 0 to {num_classes - 1}")
    return labels
