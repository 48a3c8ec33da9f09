"""Semi-supervised learning: which labels are kept, and batches of labelled images beside views of unlabelled ones."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def split_labels(
    y: Sequence[int] | np.ndarray | Tensor, labels: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """The indices of ``labels`` samples whose label is kept, and of all others, each in random order.

    The kept ones are spread over the classes in their proportion, as evenly as whole numbers allow: each next label goes
    to the class that lags most behind its share, the first class where several do (Berthelot et al., 2019). With equal
    classes each has as many. Raises ``ValueError`` where no sample would be left unlabelled, where a class has none, or
    where there are fewer labels than classes.

    >>> kept, rest = split_labels([0, 0, 0, 1, 1, 1], 2, np.random.default_rng(0))
    >>> sorted(int(i) // 3 for i in kept), len(rest)
    ([0, 1], 4)
    """
    y = np.asarray(y)
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(f"y is {y.dtype} of shape {y.shape}, allowed are class numbers (n,)")
    if len(y) and y.min() < 0:
        raise ValueError(f"y holds {y.min()}, allowed are class numbers from 0")
    counts = np.bincount(y)
    if (counts == 0).any():
        raise ValueError(f"class {int(np.argmin(counts))} has no sample, allowed is at least one of each")
    if not len(counts) <= labels < len(y):
        raise ValueError(
            f"labels is {labels}, allowed is at least one a class, {len(counts)}, and fewer than the {len(y)} samples"
        )
    share, kept = counts / counts.max(), np.zeros(len(counts), dtype=int)
    for _ in range(labels):
        lag = np.where(kept < counts, share - kept / max(1, kept.max()), -np.inf)
        kept[np.argmax(lag)] += 1
    chosen = np.concatenate([rng.permutation(np.flatnonzero(y == c))[: kept[c]] for c in range(len(counts))])
    return rng.permutation(chosen), rng.permutation(np.setdiff1d(np.arange(len(y)), chosen))


def with_labelled(
    x: Tensor, y: Tensor, augment: Callable[[torch.Generator, Tensor, Tensor], tuple[Any, ...]], *, views: int = 2
) -> Callable[[torch.Generator, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """A transform for ``fit`` over unlabelled images: adds labelled ones, and augments both.

    Of a batch (b, ...) it makes b augmented images of ``x`` with their labels ``y``, and ``views`` independent
    augmentations of each unlabelled image, (b, views, ...). The labelled set is gone through in a random order, over and
    over, so that in every batch each of its images stands as often as the others, give or take one.

    >>> transform = with_labelled(torch.rand(3, 1, 4, 4), torch.arange(3), lambda generator, x, y: (x, y))
    >>> [part.shape for part in transform(torch.Generator(), torch.rand(8, 1, 4, 4))]
    [torch.Size([8, 1, 4, 4]), torch.Size([8]), torch.Size([8, 2, 1, 4, 4])]
    """
    if len(x) != len(y) or not len(x):
        raise ValueError(f"x has {len(x)} and y {len(y)} labelled samples, allowed is one label each, and at least one")
    if views < 1:
        raise ValueError(f"views is {views}, allowed is views >= 1")

    def transform(generator: torch.Generator, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rounds = -(-len(u) // len(x))
        order = torch.cat([torch.randperm(len(x), generator=generator) for _ in range(rounds)])[: len(u)]
        labelled, labels = augment(generator, x[order], y[order])
        unknown = torch.zeros(len(u), dtype=y.dtype)
        seen = torch.stack([augment(generator, u, unknown)[0] for _ in range(views)], 1)
        return labelled, labels, seen

    return transform
