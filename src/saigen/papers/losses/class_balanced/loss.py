"""The class-balanced loss (Cui, Jia, Lin, Song, Belongie, 2019, arXiv 1901.05555).

A new sample of a class may overlap with what is already there. With N prototypes in a class, n samples are worth an
effective number of (section 3, proposition 1)

    E_n = (1 - beta^n) / (1 - beta),    beta = (N - 1) / N

which runs from 1 (beta = 0: every class counts the same, no re-weighting) to n (beta -> 1: inverse class frequency).
Any loss L is re-weighted by the inverse effective number of the true class y, the C weights summing to C (section 4):

    CB(z, y) = w_y L(z, y),    w_c proportional to 1 / E_{n_c}

with three losses L on the logits z: softmax cross-entropy, sigmoid cross-entropy (the sum of the C one-against-rest terms)
and focal loss, where each of these terms is multiplied by (1 - p_t)^gamma.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from saigen.nn.labels import check_labels

KINDS = ("softmax", "sigmoid", "focal")
REDUCTIONS = ("mean", "sum", "none")
Counts = Sequence[int] | Sequence[float] | np.ndarray | Tensor


# The effective number of samples (section 3)


def effective_number(
    counts: Counts, beta: float | int, *, dtype: torch.dtype | None = None
) -> Float[Tensor, " classes"]:
    """E_n of every class from its number of samples n, (classes,); equation 2.

    ``beta`` in [0, 1] is (N - 1) / N for N prototypes in a class; 1 is the limit, where E_n = n. Computed in float64 and
    returned in ``dtype``, torch's default if none is given. Raises ``ValueError`` naming the class without a sample.

    >>> effective_number([1, 2, 5000], beta=0.9)
    tensor([ 1.0000,  1.9000, 10.0000])
    """
    return torch.tensor(_effective_number(counts, beta).tolist(), dtype=dtype or torch.get_default_dtype())


def class_balanced_weights(
    counts: Counts, beta: float | int = 0.9999, *, dtype: torch.dtype | None = None
) -> Float[Tensor, " classes"]:
    """w_c = C / E_{n_c} / sum_k 1 / E_{n_k}, which sum to the number of classes C, (classes,).

    For any loss that takes class weights; mind that ``torch.nn.CrossEntropyLoss(weight=...)`` divides a batch by the sum of
    its weights, where the paper divides by its size.

    >>> class_balanced_weights([100, 10, 1], beta=0.99)
    tensor([0.0430, 0.2849, 2.6721])
    """
    inverse = 1.0 / _effective_number(counts, beta)
    return torch.tensor((inverse * (len(inverse) / inverse.sum())).tolist(), dtype=dtype or torch.get_default_dtype())


def _effective_number(counts: Counts, beta: float | int) -> np.ndarray:
    n = np.asarray(counts.tolist() if isinstance(counts, Tensor) else counts)
    if n.ndim != 1 or len(n) == 0 or n.dtype.kind not in "iuf":
        raise ValueError(
            f"counts has shape {n.shape} and type {n.dtype}, allowed are numbers of samples in one dimension, one a class"
        )
    wrong = np.flatnonzero(~((n > 0) & np.isfinite(n)))
    if len(wrong):
        raise ValueError(
            f"counts[{wrong[0]}] is {n[wrong[0]]}, allowed are positive numbers: class {wrong[0]} needs a sample, or leave it out"
        )
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}, allowed is 0 <= beta <= 1")
    if beta == 1:
        return n.astype(float)
    if beta == 0:
        return np.ones(len(n))
    # 1 - beta^n would lose its digits where n (1 - beta) is small.
    return -np.expm1(n * math.log1p(beta - 1.0)) / (1.0 - beta)


# The loss (section 4)


def class_balanced_loss(
    logits: Float[Tensor, "b classes *d"],
    target: Int[Tensor, "b *d"],
    weight: Float[Tensor, " classes"] | None = None,
    *,
    kind: str = "softmax",
    gamma: float | int = 1.0,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    """w_y L(z, y) of ``logits`` (b, classes, *d) with classes ``target`` (b, *d), at least in float32.

    ``weight`` is (classes,), as ``class_balanced_weights`` gives it; None weighs nothing. ``kind`` is ``"softmax"``,
    ``"sigmoid"`` or ``"focal"``, the last with ``gamma`` >= 0. ``reduction="mean"`` divides by the number of labels, as the
    official code does, not by the sum of their weights; ``"none"`` gives (b, *d).
    Raises ``ValueError`` for shapes and options that do not fit, and, for labels on the CPU outside ``torch.compile``, naming
    the first label out of range; elsewhere the device's own check stops it.

    >>> logits, target = torch.tensor([[2.0, -1, 0.5], [0, 1, -2]]), torch.tensor([0, 2])
    >>> round(class_balanced_loss(logits, target, kind="focal", gamma=2.0).item(), 6)
    1.463553
    """
    _check(logits, target, weight, kind, gamma, reduction)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    weight = None if weight is None else weight.to(logits)
    if kind == "softmax":
        loss = F.cross_entropy(logits, target, weight, reduction="none" if reduction == "none" else "sum")
    else:
        loss = _one_against_rest(logits, target, gamma if kind == "focal" else 0.0)
        loss = loss if weight is None else loss * weight[target]
        loss = loss if reduction == "none" else loss.sum()
    return loss / target.numel() if reduction == "mean" else loss


def _one_against_rest(logits: Tensor, target: Tensor, gamma: float) -> Tensor:
    """sum_i (1 - p_i^t)^gamma BCE_i, (b, *d), with p^t = sigmoid(z) for the true class and 1 - sigmoid(z) for the others."""
    true = target.unsqueeze(1)
    # How far each logit is on the wrong side: 1 - p^t is sigmoid(wrong), so that -log p^t = softplus(wrong).
    wrong = logits.scatter(1, true, -logits.gather(1, true))
    loss = F.softplus(wrong, threshold=40.0)  # above, exact in float64 as well
    if gamma > 0:
        # A power of 1 - p^t would have an infinite slope at 0 for gamma < 1; in the exponent nothing over- or underflows.
        loss = loss * torch.exp(gamma * F.logsigmoid(wrong))
    return loss.sum(1)


def _check(logits: Tensor, target: Tensor, weight: Tensor | None, kind: str, gamma: float, reduction: str) -> None:
    _check_options(kind, gamma, reduction)
    if logits.ndim < 2 or logits.shape[:1] + logits.shape[2:] != target.shape:
        raise ValueError(
            f"target has shape {tuple(target.shape)} with logits of shape {tuple(logits.shape)}, allowed are logits "
            f"(b, classes, ...) and target (b, ...)"
        )
    classes = logits.shape[1]
    if weight is not None and weight.shape != (classes,):
        raise ValueError(f"weight has shape {tuple(weight.shape)}, allowed is one a class of the logits, ({classes},)")
    check_labels(target, classes)


def _check_options(kind: str, gamma: float, reduction: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, allowed are {', '.join(KINDS)}")
    if not 0 <= gamma < math.inf:
        raise ValueError(f"gamma is {gamma}, allowed is gamma >= 0")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}, allowed are {', '.join(REDUCTIONS)}")


class ClassBalancedLoss(nn.Module):
    """``class_balanced_loss`` with the weights of a training set that holds ``counts[c]`` samples of class c.

    The paper chooses ``beta`` among 0.9, 0.99, 0.999 and 0.9999, and ``gamma`` among 0.5, 1 and 2. For the sigmoid and the
    focal loss the last layer starts with ``init_class_prior``.

    >>> loss = ClassBalancedLoss([5000, 500, 50], beta=0.9999, kind="focal", gamma=1.0)
    >>> loss(torch.randn(8, 3), torch.arange(8) % 3).shape
    torch.Size([])
    """

    weight: Tensor

    def __init__(
        self,
        counts: Counts,
        beta: float | int = 0.9999,
        *,
        kind: str = "softmax",
        gamma: float | int = 1.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        _check_options(kind, gamma, reduction)
        self.beta, self.kind, self.gamma, self.reduction = beta, kind, gamma, reduction
        self.register_buffer("weight", class_balanced_weights(counts, beta))

    def forward(self, logits: Float[Tensor, "b classes *d"], target: Int[Tensor, "b *d"]) -> Float[Tensor, "..."]:
        return class_balanced_loss(
            logits, target, self.weight, kind=self.kind, gamma=self.gamma, reduction=self.reduction
        )

    def extra_repr(self) -> str:
        focal = f", gamma={self.gamma:g}" if self.kind == "focal" else ""
        return f"classes={len(self.weight)}, beta={self.beta:g}, kind={self.kind}{focal}, reduction={self.reduction}"


# Training with sigmoids (section 4.2 and the official code)


@torch.no_grad()
def init_class_prior(layer: nn.Module) -> nn.Module:
    """Sets the bias of a last layer to -log(C - 1) for its C outputs, so that every sigmoid starts near 1 / C.

    Without it the C - 1 negatives of every sample make a huge loss at the start. Returns the layer.

    >>> init_class_prior(nn.Linear(64, 10)).bias[0].sigmoid()
    tensor(0.1000)
    """
    bias = getattr(layer, "bias", None)
    if not isinstance(bias, Tensor) or len(bias) < 2:
        raise ValueError(f"layer is {layer}, allowed is a layer with a bias for at least 2 classes")
    bias.fill_(-math.log(len(bias) - 1))
    return layer


def decay_groups(parameters: Iterable[nn.Parameter], bias: nn.Parameter, weight_decay: float) -> list[dict]:
    """Parameter groups for an optimizer: ``weight_decay`` for all ``parameters`` but ``bias``, that of the last layer.

    >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> optimizer = torch.optim.SGD(decay_groups(net.parameters(), net[2].bias, 2e-4), lr=0.1, momentum=0.9)
    """
    every = list(parameters)
    others = [parameter for parameter in every if parameter is not bias]
    if len(others) == len(every):
        raise ValueError(f"bias has shape {tuple(bias.shape)} and is none of the parameters, allowed is one of them")
    return [{"params": others, "weight_decay": weight_decay}, {"params": [bias], "weight_decay": 0.0}]
