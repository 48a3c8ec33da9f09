"""Mixing of samples and of their soft labels: mixup (Zhang et al., 2018) and CutMix (Yun et al., 2019).

x' = λ x + (1 - λ) x_partner        y' = λ y + (1 - λ) y_partner        λ ~ Beta(alpha, alpha)
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Num
from torch import Tensor, nn


def mixing_weights(
    n: int, alpha: float | int, *, dominant: bool = False, generator: torch.Generator | None = None
) -> Float[Tensor, "n"]:
    """``n`` draws of λ ~ Beta(alpha, alpha), in double precision; ``dominant`` takes the larger of λ and 1 - λ.

    As alpha goes to 0, λ becomes 0 or 1, which is what alpha = 0 gives. Raises ``ValueError`` for a negative ``alpha``.

    >>> mixing_weights(3, 0.75, dominant=True, generator=torch.Generator().manual_seed(0)).min().item() >= 0.5
    True
    """
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha is {alpha}, allowed is alpha >= 0")
    if alpha == 0:
        weights = torch.randint(2, (n,), generator=generator).double()
    else:
        # Gamma(alpha) = Gamma(alpha + 1) U^(1 / alpha), in logarithms: a small alpha would underflow to 0 / 0.
        gamma = torch._standard_gamma(torch.full((2, n), alpha + 1.0, dtype=torch.double), generator=generator)
        uniform = torch.rand(2, n, dtype=torch.double, generator=generator)
        first, second = gamma.log() + uniform.log() / alpha
        weights = (first - second).sigmoid()
    return torch.maximum(weights, 1 - weights) if dominant else weights


def mix(
    x: Num[Tensor, "n *rest"],
    weights: Float[Tensor, "n"] | float,
    others: Num[Tensor, "m *rest"],
    order: Int[Tensor, "n"],
) -> Num[Tensor, "n *rest"]:
    """``weights x + (1 - weights) others[order]``, one weight for all or one a sample; differentiable in both.

    >>> mix(torch.tensor([[0.0], [4.0]]), 0.75, torch.tensor([[0.0], [4.0]]), torch.tensor([1, 0])).flatten().tolist()
    [1.0, 3.0]
    """
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}, allowed are floats: levels and class numbers cannot be mixed")
    if isinstance(weights, Tensor):
        weights = weights.to(x).view(-1, *[1] * (x.ndim - 1))
    # What was gathered is a copy already, and is mixed in place.
    return others.index_select(0, order).lerp_(x, weights)


def soft_labels(y: Num[Tensor, "n *k"], num_classes: int) -> Float[Tensor, "n k2"]:
    """Class numbers (n,) as one-hot rows (n, num_classes); rows that are soft already pass.

    Raises ``ValueError`` for a class number or a width that ``num_classes`` does not know.
    """
    if y.ndim == 2 and y.is_floating_point() and y.shape[1] == num_classes:
        return y
    if y.ndim != 1 or y.is_floating_point():
        raise ValueError(
            f"y is {y.dtype} of shape {tuple(y.shape)}, allowed are class numbers (n,) and rows (n, {num_classes})"
        )
    # On an accelerator the look at the numbers would wait for all that is under way.
    if y.device.type == "cpu" and len(y) and not 0 <= int(y.min()) <= int(y.max()) < num_classes:
        raise ValueError(f"y holds {int(y.min())} to {int(y.max())}, allowed are classes from 0 to {num_classes - 1}")
    return F.one_hot(y.long(), num_classes).float()


class Mixup(nn.Module):
    """Mixup of a batch: images (b, ...) and class numbers (b,) or soft labels (b, k) to mixed images and soft labels.

    One λ ~ Beta(alpha, alpha) a batch, or with ``per_sample`` one a sample; partners are a random permutation. In eval
    mode the images pass and the labels become soft. ``generator`` is on the CPU.

    >>> x, y = Mixup(1.0, num_classes=3)(torch.rand(4, 1, 2, 2), torch.tensor([0, 1, 2, 0]))
    >>> x.shape, y.sum(1).round().tolist()
    (torch.Size([4, 1, 2, 2]), [1.0, 1.0, 1.0, 1.0])
    """

    def __init__(self, alpha: float | int, num_classes: int, *, per_sample: bool = False) -> None:
        super().__init__()
        _check(alpha, num_classes)
        self.alpha, self.num_classes, self.per_sample = alpha, num_classes, per_sample

    def forward(
        self, x: Float[Tensor, "b *rest"], y: Num[Tensor, "b *k"], *, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "b *rest"], Float[Tensor, "b k2"]]:
        y = soft_labels(y, self.num_classes)
        if not self.training or self.alpha == 0:
            return x, y
        weights = mixing_weights(len(x) if self.per_sample else 1, self.alpha, generator=generator)
        weights = weights if self.per_sample else weights.item()
        partner = torch.randperm(len(x), generator=generator).to(x.device)
        return mix(x, weights, x, partner), mix(y, weights, y, partner)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}, num_classes={self.num_classes}, per_sample={self.per_sample}"


class CutMix(nn.Module):
    """CutMix of a batch: a box of about 1 - λ of the area comes from the partner, and the label in that proportion.

    One box a batch, of the image's shape, at a uniform centre and cut off at the border, as in the published code; the
    labels are weighted by the area that is left. In eval mode the images pass and the labels become soft.

    >>> x, y = CutMix(1.0, num_classes=3)(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0]))
    >>> x.shape, y.shape
    (torch.Size([4, 1, 8, 8]), torch.Size([4, 3]))
    """

    def __init__(self, alpha: float | int, num_classes: int) -> None:
        super().__init__()
        _check(alpha, num_classes)
        self.alpha, self.num_classes = alpha, num_classes

    def forward(
        self, x: Float[Tensor, "b c h w"], y: Num[Tensor, "b *k"], *, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b k2"]]:
        y = soft_labels(y, self.num_classes)
        if not self.training or self.alpha == 0:
            return x, y
        share = mixing_weights(1, self.alpha, generator=generator).item()
        rows, columns = (_span(side, share, generator) for side in x.shape[-2:])
        partner = torch.randperm(len(x), generator=generator).to(x.device)
        mixed = x.clone()
        mixed[..., rows, columns] = x[..., rows, columns].index_select(0, partner)
        left = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (x.shape[-2] * x.shape[-1])
        return mixed, mix(y, left, y, partner)

    def extra_repr(self) -> str:
        return f"alpha={self.alpha:g}, num_classes={self.num_classes}"


def _span(side: int, share: float, generator: torch.Generator | None) -> slice:
    length = int(side * math.sqrt(1 - share))
    centre = int(torch.randint(side, (), generator=generator))
    return slice(max(0, centre - length // 2), min(side, centre + length // 2))


def _check(alpha: float | int, num_classes: int) -> None:
    if not 0 <= alpha < math.inf:
        raise ValueError(f"alpha is {alpha}, allowed is alpha >= 0")
    if num_classes < 1:
        raise ValueError(f"num_classes is {num_classes}, allowed is num_classes >= 1")
