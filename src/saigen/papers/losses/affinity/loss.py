"""Affinity loss (Hayat, Khan, Zamir, Shen, Shao, 2019, arXiv 1901.07711): classes as equidistant Gaussian clusters.

In place of inner products with class weights, a feature f has with each class the affinity of the nearest of its m centres
(section 3):

    d(f, w_j) = max_t exp(-|f - w_{j,t}|^2 / sigma)    in (0, 1]

A hinge asks the true class to lead every other by a margin lambda, and a regulariser keeps all centres at equal distances, so
that no class is squeezed because it is rare:

    L_mm = 1/N sum_i sum_{j != y_i} max(0, lambda + d(f_i, w_j) - d(f_i, w_{y_i}))
    R(w) = mean over pairs of (|w_j - w_k|^2 - mu)^2,    mu = mean over pairs of |w_j - w_k|^2
    L    = L_mm + R(w)

A feature is classified by its nearest centre.
"""

import math

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.cluster import KMeans
from torch import Tensor, nn
from torch.nn import functional as F

from saigen.nn.labels import check_labels

REDUCTIONS = ("mean", "sum", "none")


# Affinity


def gaussian_affinity(
    features: Float[Tensor, "b h"], centers: Float[Tensor, "classes m h"], sigma: float | int | Float[Tensor, ""]
) -> Float[Tensor, "b classes"]:
    """d(f, w_j): the affinity of ``features`` (b, h) with the nearest of each class's ``centers`` (classes, m, h), in (0, 1].

    Computed at least in float32, under autocast too.

    >>> gaussian_affinity(torch.zeros(1, 2), torch.tensor([[[0.0, 1.0]], [[2.0, 0.0]]]), sigma=2.0)
    tensor([[0.6065, 0.1353]])
    """
    _check_centers(centers)
    if features.ndim != 2 or features.shape[1] != centers.shape[2]:
        raise ValueError(
            f"features has shape {tuple(features.shape)}, allowed is (b, {centers.shape[2]}), as long as the centers"
        )
    _check_positive(sigma=sigma)
    square = _square_distance(features, centers)
    # The largest of exponentials is that of the least distance.
    return torch.exp(-square / sigma)


def _square_distance(x: Tensor, centers: Tensor) -> Tensor:
    """|x - w_j|^2 of (b, h) to the nearest centre of each class (classes, m, h), (b, classes), by one matrix product."""
    x, centers = (t if t.dtype == torch.float64 else t.float() for t in (x, centers))
    # Sixteen-bit products would drown small distances.
    with torch.autocast(x.device.type, enabled=False):
        # Distances do not change with the origin, but the rounding of the product does: put it amid the centres.
        origin = centers.mean((0, 1)).detach()
        x, centers = x - origin, centers - origin
        every = centers.flatten(0, 1)
        # |x|^2 is the same for all centres, so the nearest is found without it.
        square = torch.addmm(every.square().sum(1), x, every.T, alpha=-2).unflatten(1, centers.shape[:2])
        nearest = square.min(2).values if centers.shape[1] > 1 else square.squeeze(2)
        return (nearest + x.square().sum(1, keepdim=True)).clamp(min=0.0)


# The loss


def max_margin_loss(
    affinity: Float[Tensor, "b classes"],
    target: Int[Tensor, " b"],
    margin: float | int = 0.75,
    *,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    """L_mm: for each sample the sum over the other classes of max(0, ``margin`` + d_j - d_y), averaged over the batch.

    It is 0 where the true class leads all others by the margin, and at most (classes - 1) (margin + 1).
    """
    _check_loss(affinity, target, margin, reduction)
    affinity = affinity if affinity.dtype == torch.float64 else affinity.float()
    # torch's hinge is divided by the number of classes; the paper's is not.
    return affinity.shape[1] * F.multi_margin_loss(affinity, target, margin=margin, reduction=reduction)


def diversity_regularizer(centers: Float[Tensor, "classes m h"]) -> Float[Tensor, ""]:
    """R(w): the variance of the squared distances over all pairs of ``centers`` (classes, m, h); 0 where they are equidistant.

    Pairs of the same class count like others, as in the one public implementation. k centres can be equidistant in k - 1
    dimensions or more.

    >>> diversity_regularizer(torch.tensor([[[0.0, 1.0]], [[2.0, 0.0]], [[1.0, 2.0]]]))
    tensor(2.)
    """
    return _pair_distances(centers).var(correction=0)


def _pair_distances(centers: Tensor) -> Tensor:
    """|w_j - w_k|^2 over all pairs j < k of centres, (k (k - 1) / 2,)."""
    _check_centers(centers)
    every = centers.flatten(0, 1)
    j, k = torch.triu_indices(len(every), len(every), 1, device=centers.device)
    return _square_distance(every, every[:, None])[j, k]


def affinity_loss(
    affinity: Float[Tensor, "b classes"],
    target: Int[Tensor, " b"],
    centers: Float[Tensor, "classes m h"],
    *,
    margin: float | int = 0.75,
    diversity: float | int = 1.0,
    reduction: str = "mean",
) -> Float[Tensor, "..."]:
    """L = L_mm + ``diversity`` R(w), with the diversity of the paper 1; ``reduction="none"`` adds R to each sample's loss.

    ``affinity`` (b, classes) is what ``gaussian_affinity`` gives for ``centers``. Raises ``ValueError`` for shapes and options
    that do not fit, and, for labels on the CPU outside ``torch.compile``, naming the first label out of range.
    """
    if not 0 <= diversity < math.inf:
        raise ValueError(f"diversity is {diversity}, allowed is diversity >= 0")
    loss = max_margin_loss(affinity, target, margin, reduction=reduction)
    return loss + diversity * diversity_regularizer(centers) if diversity else loss


class AffinityLoss(nn.Module):
    """``affinity_loss`` with its options: the paper's lambda is ``margin``, in (0, 1].

    >>> head, criterion = AffinityHead(16, num_classes=4), AffinityLoss(margin=0.75)
    >>> criterion(head(torch.randn(8, 16)), torch.arange(8) % 4, head.centers).shape
    torch.Size([])
    """

    def __init__(self, margin: float | int = 0.75, *, diversity: float | int = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        _check_options(margin, reduction)
        if not 0 <= diversity < math.inf:
            raise ValueError(f"diversity is {diversity}, allowed is diversity >= 0")
        self.margin, self.diversity, self.reduction = margin, diversity, reduction

    def forward(
        self,
        affinity: Float[Tensor, "b classes"],
        target: Int[Tensor, " b"],
        centers: Float[Tensor, "classes m h"],
    ) -> Float[Tensor, "..."]:
        return affinity_loss(
            affinity, target, centers, margin=self.margin, diversity=self.diversity, reduction=self.reduction
        )

    def extra_repr(self) -> str:
        return f"margin={self.margin:g}, diversity={self.diversity:g}, reduction={self.reduction}"


# The head


class AffinityHead(nn.Module):
    """Stands in for the last linear layer: features (b, in_features) to affinities (b, num_classes), with the centres to learn.

    ``num_centers`` is m, ``sigma`` the squared width of the Gaussian. Where features lie many sigma from every centre, all
    affinities and gradients vanish: give it batch-normalised features, and a sigma of about their squared distance from
    the centres (``fit_sigma``; for batch-normalised features, about in_features). Centres start as He's normal,
    and ``fit_centers`` puts them amid features that are there.

    >>> head = AffinityHead(64, num_classes=10, num_centers=5, sigma=64.0)
    >>> head(torch.randn(2, 64)).shape
    torch.Size([2, 10])
    """

    centers: Tensor
    sigma: Tensor

    def __init__(self, in_features: int, num_classes: int, num_centers: int = 1, *, sigma: float | int = 10.0) -> None:
        super().__init__()
        for name, value, least in (
            ("in_features", in_features, 1),
            ("num_classes", num_classes, 2),
            ("num_centers", num_centers, 1),
        ):
            if value < least:
                raise ValueError(f"{name} is {value}, allowed is {name} >= {least}")
        _check_positive(sigma=sigma)
        self.in_features, self.num_classes, self.num_centers = in_features, num_classes, num_centers
        self.centers = nn.Parameter(torch.empty(num_classes, num_centers, in_features))
        self.register_buffer("sigma", torch.tensor(float(sigma)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.centers, std=math.sqrt(2.0 / self.in_features))

    def forward(self, features: Float[Tensor, "b h"]) -> Float[Tensor, "b classes"]:
        return gaussian_affinity(features, self.centers, self.sigma)

    def regularizer(self) -> Float[Tensor, ""]:
        """R of the centres."""
        return diversity_regularizer(self.centers)

    def equidistance(self) -> Float[Tensor, ""]:
        """The coefficient of variation of the distances between centres: 0 where all are equidistant."""
        distance = _pair_distances(self.centers).sqrt()
        return distance.std(correction=0) / distance.mean()

    @torch.no_grad()
    def fit_sigma(self, features: Float[Tensor, "b h"], quantile: float = 0.5) -> "AffinityHead":
        """Sets sigma to that quantile of the squared distances of ``features`` from all centres; returns the head."""
        if not 0 < quantile <= 1:
            raise ValueError(f"quantile is {quantile}, allowed is 0 < quantile <= 1")
        square = _square_distance(features, self.centers.flatten(0, 1)[:, None]).quantile(quantile)
        if not square > 0:
            raise ValueError("features lie on the centers, allowed are features at a distance from them")
        self.sigma.copy_(square)
        return self

    @torch.no_grad()
    def fit_centers(
        self, features: Float[Tensor, "b h"], target: Int[Tensor, " b"], random_state: int = 0
    ) -> "AffinityHead":
        """Puts the centres of each class on its k-means (its mean for one centre), so that none lies dead; returns the head.

        Raises ``ValueError`` naming the class that has fewer samples than centres.
        """
        check_labels(target, self.num_classes)
        x, y = features.detach().float().cpu().numpy(), target.cpu().numpy()
        few = np.flatnonzero(np.bincount(y, minlength=self.num_classes) < self.num_centers)
        if len(few):
            raise ValueError(
                f"class {few[0]} has {int((y == few[0]).sum())} samples, allowed are at least num_centers = "
                f"{self.num_centers} of every class"
            )
        for c in range(self.num_classes):
            found = KMeans(self.num_centers, n_init=4, random_state=random_state).fit(x[y == c]).cluster_centers_
            self.centers[c] = torch.from_numpy(found).to(self.centers)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, num_classes={self.num_classes}, num_centers={self.num_centers}"


# What is allowed


def _check_positive(**values: float | Tensor) -> None:
    for name, value in values.items():
        if not isinstance(value, Tensor) and not 0 < value < math.inf:
            raise ValueError(f"{name} is {value}, allowed is {name} > 0")


def _check_centers(centers: Tensor) -> None:
    if centers.ndim != 3 or centers.shape[0] * centers.shape[1] < 2:
        raise ValueError(f"centers has shape {tuple(centers.shape)}, allowed is (classes, m, h) with 2 centres or more")


def _check_options(margin: float, reduction: str) -> None:
    if not 0 < margin <= 1:
        raise ValueError(f"margin is {margin}, allowed is 0 < margin <= 1, the scale of affinities")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}, allowed are {', '.join(REDUCTIONS)}")


def _check_loss(affinity: Tensor, target: Tensor, margin: float, reduction: str) -> None:
    _check_options(margin, reduction)
    if affinity.ndim != 2 or target.shape != affinity.shape[:1]:
        raise ValueError(
            f"target has shape {tuple(target.shape)} with affinity of shape {tuple(affinity.shape)}, allowed are affinity "
            f"(b, classes) and target (b,)"
        )
    check_labels(target, affinity.shape[1])
