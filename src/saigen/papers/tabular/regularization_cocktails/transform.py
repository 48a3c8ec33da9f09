"""Augmentation of a batch of rows: one of these, or none, is part of a cocktail (section 3 and Table 1 of the paper).

Each gives the batch with two labels a row and the weight of the first, and the loss is
``weight L(f(x), y) + (1 - weight) L(f(x), other)``. Rows are encoded: standardised values and one-hot categories.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from saigen.nn.mixing import mix, mixing_weights

AUGMENTATIONS = (None, "mixup", "cutout", "cutmix", "adversarial")
EPSILON = 0.007
"""The size of the adversarial step, which the paper's search leaves alone."""


class Mixed(NamedTuple):
    """A batch after augmentation: rows (n, d), labels (n,), the partners' labels (n,), and the first one's weight."""

    x: Tensor
    y: Tensor
    other: Tensor
    weight: float


def row_mixup(
    x: Float[Tensor, "n d"], y: Int[Tensor, "n"], alpha: float | int, *, generator: torch.Generator | None = None
) -> Mixed:
    """Mixup: ``lambda x + (1 - lambda) x_partner``, one lambda ~ Beta(alpha, alpha) a batch; alpha = 0 mixes nothing.

    >>> row_mixup(torch.ones(2, 3), torch.tensor([0, 1]), 0.0).weight
    1.0
    """
    weight = mixing_weights(1, alpha, generator=generator).item() if alpha > 0 else _unmixed(alpha)
    partner = torch.randperm(len(x), generator=generator).to(x.device)
    return Mixed(mix(x, weight, x, partner), y, y[partner], weight)


def _unmixed(alpha: float | int) -> float:
    if alpha < 0:
        raise ValueError(f"alpha is {alpha}, allowed is alpha >= 0")
    return 1.0


def row_cutout(
    x: Float[Tensor, "n d"],
    y: Int[Tensor, "n"],
    probability: float | int,
    ratio: float | int,
    *,
    generator: torch.Generator | None = None,
) -> Mixed:
    """Cutout: with ``probability``, max(1, floor(ratio d)) columns, the same in the whole batch, become 0.

    0 is the mean of a standardised column, and in one-hot columns no category.

    >>> row_cutout(torch.ones(2, 4), torch.tensor([0, 1]), 1.0, 0.5).x.sum(1).tolist()
    [2.0, 2.0]
    """
    _check(probability=probability, ratio=ratio)
    if _draw(generator) < probability:
        columns = _columns(x.shape[1], ratio, generator)
        x = x.clone()
        x[:, columns] = 0
    return Mixed(x, y, y, 1.0)


def row_cutmix(
    x: Float[Tensor, "n d"], y: Int[Tensor, "n"], probability: float | int, *, generator: torch.Generator | None = None
) -> Mixed:
    """CutMix: with ``probability``, max(1, floor(lambda d)) columns, lambda ~ U(0, 1), come from a partner row.

    The columns are the same in the whole batch; the weight of the row's own label is the share of columns it keeps.

    >>> row_cutmix(torch.rand(2, 4), torch.tensor([0, 1]), 1.0).weight <= 0.75
    True
    """
    _check(probability=probability)
    if _draw(generator) >= probability:
        return Mixed(x, y, y, 1.0)
    columns = _columns(x.shape[1], _draw(generator), generator)
    partner = torch.randperm(len(x), generator=generator).to(x.device)
    mixed = x.clone()
    mixed[:, columns] = x[:, columns][partner]
    return Mixed(mixed, y, y[partner], 1 - len(columns) / x.shape[1])


def fgsm(
    model: nn.Module,
    x: Float[Tensor, "n d"],
    y: Int[Tensor, "n"],
    epsilon: float | int = EPSILON,
    *,
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    low: float | int | None = None,
    high: float | int | None = None,
) -> Float[Tensor, "n d"]:
    """The rows a step towards more loss: ``x + epsilon sign(dL/dx)``, and no gradient left in model or rows.

    ``low`` and ``high`` bound the result, if given: the published code has 0 and 1, which are bounds of pixels.
    """
    if epsilon < 0:
        raise ValueError(f"epsilon is {epsilon}, allowed is epsilon >= 0")
    with torch.enable_grad():
        perturbed = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(model(perturbed), y), perturbed)
    moved = x.detach() + epsilon * gradient.sign()
    return moved if low is None and high is None else moved.clamp(low, high)


def mixed_loss(
    logits: Float[Tensor, "n classes"], batch: Mixed, class_weights: Float[Tensor, "classes"] | None = None
) -> Float[Tensor, ""]:
    """The weighted cross-entropy of both labels; each is a mean weighed by the classes in it, as in the published code."""
    own = F.cross_entropy(logits, batch.y, class_weights)
    if batch.weight == 1:
        return own
    return batch.weight * own + (1 - batch.weight) * F.cross_entropy(logits, batch.other, class_weights)


def _draw(generator: torch.Generator | None) -> float:
    return torch.rand((), generator=generator).item()


def _columns(d: int, share: float, generator: torch.Generator | None) -> Tensor:
    return torch.randperm(d, generator=generator)[: max(1, int(d * share))]


def _check(**values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}, allowed is a number from 0 to 1")
