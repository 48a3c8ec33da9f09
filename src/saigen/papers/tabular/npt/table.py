"""From a table to NPT's columns, what is masked of them, and the loss on it (Sections 2.2 and 2.6).

An encoded column is (n, H_j): one-hot categories, or one standardised number, and then the mask token. A masked entry is all
zeros with the token set; so is one that is missing.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

Columns = list[Tensor]


class TableEncoder:
    """Encodes the features of a table and its target, which is the last column.

    Statistics come from the rows given here: means and deviations, and the categories that occur. ``categorical`` are the
    feature columns whose values are categories; the target has ``classes`` of them, or none and is a number. A category that
    was not there is treated as missing.
    """

    def __init__(
        self,
        x: Float[np.ndarray, "n f"],
        y: np.ndarray,
        categorical: Sequence[int] = (),
        classes: int | None = None,
    ) -> None:
        numbers = np.isin(np.arange(x.shape[1]), list(categorical), invert=True)
        self.features = x.shape[1]
        self.categories = {
            int(j): np.unique(x[~np.isnan(x[:, j]), j]) for j in np.flatnonzero(~numbers)
        }  # column by column, since each has its own
        self.classes = classes
        self.mean, self.deviation = np.zeros(x.shape[1] + 1), np.ones(x.shape[1] + 1)
        values = np.column_stack([x, np.zeros(len(y)) if classes else y]).astype(float)
        for j in [*np.flatnonzero(numbers), *([] if classes else [x.shape[1]])]:
            known = values[~np.isnan(values[:, j]), j]
            if known.size:
                self.mean[j], spread = known.mean(), known.std()
                # What is left of a constant column after rounding is no deviation.
                self.deviation[j] = spread if spread > 10 * np.finfo(float).eps * abs(self.mean[j]) else 1.0

    @property
    def input_dims(self) -> list[int]:
        widths = [max(1, len(self.categories[j])) if j in self.categories else 1 for j in range(self.features)]
        return [width + 1 for width in [*widths, self.classes or 1]]

    @property
    def categorical(self) -> list[int]:
        """The columns of categories, the target (the last) among them."""
        return [*sorted(self.categories), *([self.features] if self.classes else [])]

    def encode(
        self, x: Float[np.ndarray, "n f"], y: np.ndarray | None, dtype: torch.dtype = torch.float32
    ) -> list[Float[Tensor, "n _"]]:
        """Columns of shape (n, H_j); ``y`` None: the target is masked in every row."""
        columns = [self._column(x[:, j], j, dtype) for j in range(self.features)]
        if y is None:
            y = np.full(len(x), np.nan)
        return [*columns, self._column(np.asarray(y, dtype=float), self.features, dtype)]

    def _column(self, values: np.ndarray, j: int, dtype: torch.dtype) -> Tensor:
        missing = np.isnan(values)
        if j in self.categories or (j == self.features and self.classes):
            known = self.categories.get(j, np.arange(self.classes or 0))
            codes = np.searchsorted(known, np.where(missing, 0, values)).clip(max=max(0, len(known) - 1))
            missing = missing | (known[codes] != values) if len(known) else np.ones_like(missing)
            encoded = np.eye(max(1, len(known)) + 1)[codes]
        else:
            encoded = np.stack([(values - self.mean[j]) / self.deviation[j], np.zeros(len(values))], axis=1)
        encoded[missing] = np.eye(encoded.shape[1])[-1]
        return torch.tensor(encoded, dtype=dtype)


def known_entries(columns: Sequence[Tensor]) -> Bool[Tensor, "n d"]:
    """Which entries are neither masked nor missing."""
    return torch.stack([column[:, -1] == 0 for column in columns], dim=1)


def mask_entries(
    columns: Sequence[Float[Tensor, "n _"]],
    candidates: Bool[Tensor, "n d"],
    probability: float,
    *,
    categorical: Sequence[int] = (),
    random_share: float = 0.1,
    generator: torch.Generator | None = None,
) -> tuple[list[Float[Tensor, "n _"]], Bool[Tensor, "n d"]]:
    """Masks each of ``candidates`` with ``probability``; gives the columns and what was masked.

    Of the masked entries ``random_share`` show a random category, or a number from N(0, 1), in place of the token, as in
    BERT; with probability 1 all show the token. ``columns`` stay as they are.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability is {probability}, allowed are 0 to 1")
    n, d, of = len(columns[0]), len(columns), {"device": columns[0].device}
    if probability == 1:
        masked, random = candidates, torch.zeros_like(candidates)
    else:
        draw = torch.rand(2, n, d, generator=generator, **of)
        masked = candidates & (draw[0] < probability)
        random = masked & (draw[1] < random_share)
    changed = []
    for j, column in enumerate(columns):
        token = torch.zeros_like(column[0])
        token[-1] = 1
        out = torch.where(masked[:, j, None], token, column)
        if probability < 1 and random_share > 0:
            if j in categorical:
                drawn = torch.randint(column.shape[1] - 1, (n,), generator=generator, **of)
                value = F.one_hot(drawn, column.shape[1]).to(column.dtype)
            else:
                if column.shape[1] != 2:
                    raise ValueError(
                        f"column {j} is {column.shape[1]} wide and not in categorical, allowed is 2 for a number"
                    )
                noise = torch.randn(n, generator=generator, dtype=column.dtype, **of)
                value = torch.stack([noise, torch.zeros_like(noise)], dim=1)
            out = torch.where(random[:, j, None], value, out)
        changed.append(out)
    return changed, masked


def npt_loss(
    outputs: Sequence[Float[Tensor, "*t n _"]],
    columns: Sequence[Float[Tensor, "*t n _"]],
    feature_mask: Bool[Tensor, "*t n d"],
    label_mask: Bool[Tensor, "*t n d"],
    tradeoff: float,
    *,
    categorical: Sequence[int] = (),
) -> Float[Tensor, ""]:
    """tradeoff * L(features) + (1 - tradeoff) * L(targets), each averaged over the entries that are masked (Equation 7).

    Cross-entropy of categories, squared error of standardised numbers. ``columns`` are the true ones. A mask that is empty
    adds nothing.
    """
    entries = torch.stack(
        [
            _cross_entropy(out, true[..., :-1])
            if j in categorical
            else (out.squeeze(-1) - true[..., 0]) ** 2
            for j, (out, true) in enumerate(zip(outputs, columns, strict=True))
        ],
        dim=-1,
    )  # fmt: skip
    shares = [(tradeoff, feature_mask), (1 - tradeoff, label_mask)]
    # where, not a product: an entry that is not asked for must not count, whatever it holds
    return sum(
        share * torch.where(mask, entries, torch.zeros_like(entries)).sum() / mask.sum().clamp(min=1)
        for share, mask in shares
        if share > 0
    ) + torch.zeros((), dtype=entries.dtype, device=entries.device)


def _cross_entropy(out: Tensor, true: Tensor) -> Tensor:
    return -(out.log_softmax(dim=-1) * true).sum(dim=-1)


def cosine_tradeoff(step: int, steps: int, start: float = 1.0) -> float:
    """How much the features count at ``step``: from ``start`` down to 0 in half a cosine (Section 2.6).

    >>> [round(cosine_tradeoff(step, 4), 3) for step in range(5)]
    [1.0, 0.854, 0.5, 0.146, 0.0]
    """
    return start * 0.5 * (math.cos(math.pi * min(step / steps, 1.0)) + 1)


def stratified_batches(
    groups: Int[np.ndarray, " n"], batch_size: int, rng: np.random.Generator
) -> Iterator[Int[np.ndarray, " b"]]:
    """Row indices of batches of at most ``batch_size``, each with as large a share of every group as the whole table.

    Groups are training, validation and test rows, say, so that there are always rows to look at and rows to predict; within
    one row. Together the batches are every row once, in a new order each time.

    >>> for batch in stratified_batches(np.array([0] * 6 + [1] * 3), 3, np.random.default_rng(0)):
    ...     print(np.array([0] * 6 + [1] * 3)[batch])
    [0 0 1]
    [0 0 1]
    [0 0 1]
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, allowed is 1 or more")
    batches = math.ceil(len(groups) / batch_size)
    shuffled = rng.permutation(len(groups))
    order = shuffled[np.argsort(groups[shuffled], kind="stable")]
    for start in range(batches):
        yield order[start::batches]
