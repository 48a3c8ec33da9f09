"""What AugReg varies (sections 3.2 and 3.3): 7 strengths of augmentation x 2 of regularisation x 2 of weight decay.

Augmentation is RandAugment and mixup, regularisation dropout and stochastic depth. The loss is a sigmoid a class.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from saigen.papers.augmentation.randaugment import RandAugment

AUGREG_SETTINGS = {
    "none": (0, 0, 0.0),
    "light1": (2, 0, 0.0),
    "light2": (2, 10, 0.2),
    "medium1": (2, 15, 0.2),
    "medium2": (2, 15, 0.5),
    "strong1": (2, 20, 0.5),
    "strong2": (2, 20, 0.8),
}
"""Name -> RandAugment's layers l and magnitude m, mixup's alpha. light1 is not nothing: several operations ignore m."""


@dataclass(frozen=True)
class AugRegConfig:
    """One cell of the sweep. ``dropout`` goes to the model as ``drop_rate``, ``stochastic_depth`` as ``drop_path_rate``.

    ``weight_decay`` is decoupled and multiplied by the learning rate, as in ``torch.optim.AdamW``, and meant for kernels
    only (``kernel_groups``).
    """

    augmentation: str
    dropout: float
    stochastic_depth: float
    weight_decay: float

    @property
    def model_options(self) -> dict[str, float]:
        """The keyword arguments of a model function that this cell asks for."""
        return {"drop_rate": self.dropout, "drop_path_rate": self.stochastic_depth}


def augreg_grid() -> tuple[AugRegConfig, ...]:
    """All 28 cells.

    >>> len(augreg_grid())
    28
    """
    return tuple(
        AugRegConfig(augmentation, regularisation, regularisation, weight_decay)
        for augmentation in AUGREG_SETTINGS
        for regularisation in (0.0, 0.1)
        for weight_decay in (0.03, 0.1)
    )


_RECOMMENDED = {
    "imagenet1k": {
        "Ti/16": "light1",
        "S/32": "medium1",
        "S/16": "medium2",
        "B/32": "medium2",
        "B/16": "medium2",
        "L/16": "medium2",
    },
    "imagenet21k": {
        "Ti/16": "none",
        "S/32": "none",
        "S/16": "light1",
        "B/32": "light2",
        "B/16": "light2",
        "L/16": "medium2",
    },
}


def recommended_augreg(model: str, dataset: str) -> str:
    """The augmentation that the released configuration trains ``model`` ("B/16" …) with, on one of the two data sets.

    >>> recommended_augreg("S/16", "imagenet1k")
    'medium2'
    """
    if dataset not in _RECOMMENDED:
        raise ValueError(f"dataset is {dataset!r}, allowed are {', '.join(_RECOMMENDED)}")
    if model not in _RECOMMENDED[dataset]:
        raise ValueError(f"model is {model!r}, allowed are {', '.join(_RECOMMENDED[dataset])}")
    return _RECOMMENDED[dataset][model]


def beta_draw(alpha: float, generator: torch.Generator | None = None) -> float:
    """One draw of Beta(alpha, alpha), by two Gamma draws; 1/2 where both round to zero."""
    a, b = torch._standard_gamma(torch.full((2,), alpha, dtype=torch.double), generator=generator).tolist()
    return a / (a + b) if a + b > 0 else 0.5


def mixup(
    x: Num[Tensor, "b ..."], y: Num[Tensor, "b k"], alpha: float | int, *, generator: torch.Generator | None = None
) -> tuple[Num[Tensor, "b ..."], Num[Tensor, "b k"]]:
    """Images and one-hot targets mixed with those of the next sample: λ x_i + (1 - λ) x_{i-1}, one λ a batch.

    λ ~ Beta(alpha, alpha), the larger of λ and 1 - λ, so that a sample stays mostly itself. ``alpha`` 0 changes nothing.
    Raises ``ValueError`` for a negative ``alpha``.
    """
    if not alpha >= 0:
        raise ValueError(f"alpha is {alpha}, allowed is alpha >= 0")
    if alpha == 0:
        return x, y
    share = beta_draw(alpha, generator)
    share = max(share, 1 - share)
    return share * x + (1 - share) * x.roll(1, 0), share * y + (1 - share) * y.roll(1, 0)


class AugReg(nn.Module):
    """The augmentation of one setting: images in [0, 1] and class indices to augmented images and soft targets.

    RandAugment with the official operations (each drawn one applied with a probability drawn from [0.2, 0.8], which
    is 0.5 over all), then ``mixup``. The original moves by up to 100 pixels and cuts out up to 80 at magnitude 10
    of 224-pixel images; here both are in proportion to the image's side. In eval mode only the targets become soft.

    ``generator`` is on the CPU. Raises ``ValueError`` for a setting that is not one of ``AUGREG_SETTINGS``.

    >>> x, y = AugReg("medium1", num_classes=10)(torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))
    >>> x.shape, y.shape
    (torch.Size([4, 3, 32, 32]), torch.Size([4, 10]))
    """

    def __init__(self, setting: str, num_classes: int, img_size: int = 224) -> None:
        super().__init__()
        if setting not in AUGREG_SETTINGS:
            raise ValueError(f"setting is {setting!r}, allowed are {', '.join(AUGREG_SETTINGS)}")
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}, allowed is num_classes >= 1")
        if img_size < 1:
            raise ValueError(f"img_size is {img_size}, allowed is img_size >= 1")
        layers, magnitude, self.alpha = AUGREG_SETTINGS[setting]
        self.setting, self.num_classes = setting, num_classes
        scale = img_size / 224
        self.rand_augment = RandAugment(
            layers,
            float(magnitude),
            op_set="official",
            probability=0.5,
            translate=100.0 * scale,
            cutout=40.0 * scale,
        )

    def forward(
        self, x: Float[Tensor, "b c h w"], y: Int[Tensor, "b"], *, generator: torch.Generator | None = None
    ) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b k"]]:
        target = F.one_hot(y, self.num_classes).to(x.dtype)
        if not self.training:
            return x, target
        return mixup(self.rand_augment(x, generator=generator), target, self.alpha, generator=generator)

    def extra_repr(self) -> str:
        return f"{self.setting}, num_classes={self.num_classes}"


def sigmoid_xent(logits: Float[Tensor, "b k"], target: Float[Tensor, "b k"]) -> Float[Tensor, ""]:
    """Sigmoid cross-entropy, summed over classes and averaged over images, with one-hot or soft targets.

    >>> round(sigmoid_xent(torch.zeros(2, 5), torch.zeros(2, 5)).item(), 4)  # 5 log 2
    3.4657
    """
    return F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / logits.shape[0]


def kernel_groups(model: nn.Module, lr: float = 1e-3, weight_decay: float = 0.1) -> list[dict]:
    """Parameter groups in which only kernels decay: no bias, norm, position or class token."""
    kernels, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim > 1 and name.rpartition(".")[2] not in ("pos_embed", "cls_token")
            (kernels if plain else others).append(parameter)
    groups = ({"params": kernels, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0})
    return [{**group, "lr": lr} for group in groups if group["params"]]


def data_multiplier(sizes: Sequence[int], accuracies: Sequence[float], accuracy: float | int) -> float:
    """How many times the smallest of ``sizes`` plain training needs for ``accuracy``.

    Reads the curve of plain training (accuracy over data set size, made monotone by its running maximum) at
    ``accuracy``, log-linear between the sizes. Above the curve it gives the largest ratio of sizes; below it goes on
    as the first segment does, down to the inverse of that ratio.
    Raises ``ValueError`` where the sizes do not grow.

    >>> data_multiplier([100, 1000], [0.5, 0.9], 0.7)
    3.1622776601683795
    """
    if len(sizes) != len(accuracies) or len(sizes) < 2 or any(b <= a for a, b in itertools.pairwise(sizes)):
        raise ValueError(f"sizes is {tuple(sizes)}, allowed are two or more growing numbers, one an accuracy")
    best = -math.inf
    points: list[tuple[float, float]] = []
    for n, value in zip(sizes, accuracies, strict=True):
        if value > best:
            points.append((math.log(n / sizes[0]), value))
            best = value
    most = math.log(sizes[-1] / sizes[0])
    for (low, a), (high, b) in itertools.pairwise(points):
        if accuracy <= b:
            return math.exp(max(low + (high - low) * (accuracy - a) / (b - a), -most))
    return math.exp(most if accuracy > points[0][1] or len(points) > 1 else 0.0)
