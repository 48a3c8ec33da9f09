"""Classification Accuracy Score (Ravuri and Vinyals, NeurIPS 2019): a conditional generator is as good as what it teaches.

Draw labels as the training set has them, sample an image for each once, train a fixed classifier on the samples alone, and
score it on real data. Were p(x | y) right, the score would be that of real training data; where a class lacks modes, its
own accuracy says so. The Frechet and Inception scores beside it look at the images' marginal distribution only.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from scipy.special import xlogy
from scipy.stats import spearmanr
from torch import Tensor

Classifier = Callable[[Tensor], Tensor]
"""From images (n, ...) to logits (n, K)."""
Train = Callable[[Tensor, Tensor], Classifier]
"""The fixed recipe: from images and labels to a trained classifier. The same for every generator and for real data."""
Sampler = Callable[[Tensor, torch.Generator], Tensor]
"""A conditional generator: from labels (n,) and a random generator to one image each."""


# The score ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """Accuracies on real data: ``top1`` and ``top5`` in [0, 1], ``per_class`` (K,) with NaN for a class without examples."""

    top1: float
    top5: float
    per_class: np.ndarray

    def relative_drop(self, real: "Score") -> float:
        """(real - CAS) / real, of top 1."""
        return relative_drop(real.top1, self.top1)

    def worst_classes(self, real: "Score") -> Int[np.ndarray, " k"]:
        """The classes by how much accuracy they lose against training on real data, most first."""
        loss = np.nan_to_num(real.per_class - self.per_class, nan=-np.inf)
        return np.argsort(-loss, kind="stable")


def relative_drop(real: float, score: float) -> float:
    """(real - score) / real: the share of the real-data accuracy that the samples do not give.

    >>> round(relative_drop(73.09, 42.65), 3), round(relative_drop(91.47, 65.92), 3)
    (0.416, 0.279)
    """
    if real <= 0:
        raise ValueError(f"real is {real}, allowed is an accuracy above 0")
    return (real - score) / real


def draw_labels(labels: Tensor, count: int | None = None, *, generator: torch.Generator) -> Int[Tensor, " m"]:
    """``count`` labels drawn from the label distribution of ``labels`` (n,); by default exactly these, in another order."""
    if labels.ndim != 1 or len(labels) == 0:
        raise ValueError(f"labels has shape {tuple(labels.shape)}, needed is one label or more")
    if count is None:
        return labels[torch.randperm(len(labels), generator=generator)]
    if count < 1:
        raise ValueError(f"count is {count}, allowed is 1 or more")
    return labels[torch.randint(len(labels), (count,), generator=generator)]


@torch.no_grad()
def sample_set(sampler: Sampler, labels: Tensor, *, generator: torch.Generator, batch_size: int = 500) -> Tensor:
    """One image for each of ``labels``, drawn once: the synthetic set stays the same through the epochs of the classifier."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, allowed is 1 or more")
    parts = []
    for part in labels.split(batch_size):
        images = sampler(part, generator)
        if len(images) != len(part):
            raise ValueError(f"sampler gave {len(images)} images for {len(part)} labels, needed is one each")
        parts.append(images)
    return torch.cat(parts)


@torch.no_grad()
def score_classifier(classifier: Classifier, x: Tensor, y: Tensor, *, batch_size: int = 500) -> Score:
    """Top-1, top-5 and per-class accuracy on the real images ``x`` (n, ...) with labels ``y`` (n,).

    With five classes or fewer top 5 is 1. Logits that are not finite count as wrong.
    """
    _check_set("validation", x, y)
    logits = torch.cat([classifier(part).float() for part in x.split(batch_size)]).cpu()
    if logits.ndim != 2 or int(y.max()) >= logits.shape[1]:
        raise ValueError(f"the classifier gives {tuple(logits.shape)} logits, the labels go up to {int(y.max())}")
    y = y.cpu()
    finite = logits.isfinite().all(dim=1)
    best = logits.nan_to_num(-torch.inf).topk(min(5, logits.shape[1]), dim=1).indices
    hit = (best == y[:, None]) & finite[:, None]
    right, K = hit[:, 0].numpy(), logits.shape[1]
    counts = np.bincount(y, minlength=K)
    with np.errstate(invalid="ignore"):
        per_class = np.bincount(y, weights=right, minlength=K) / counts
    return Score(float(right.mean()), float(hit.any(dim=1).double().mean()), per_class)


def classification_accuracy_score(
    train: Train, sampler: Sampler, labels: Tensor, validation: tuple[Tensor, Tensor], *, generator: torch.Generator
) -> Score:
    """CAS: the accuracy on real ``validation`` (x, y) of a classifier that ``train`` makes of samples alone.

    ``labels`` (n,) are those of the real training set, whose distribution and number the samples take. Train on the real
    images by the same ``train`` for the score it is compared with (``score_classifier``). Raises ``ValueError`` for
    an empty set, and a sampler that does not give one image a label.
    """
    y = draw_labels(labels, generator=generator)
    return score_classifier(train(sample_set(sampler, y, generator=generator), y), *validation)


def naive_augmentation_score(
    train: Train,
    real: tuple[Tensor, Tensor],
    sampler: Sampler,
    ratios: Sequence[float],
    validation: tuple[Tensor, Tensor],
    *,
    generator: torch.Generator,
) -> dict[float, Score]:
    """NAS: training on all real images and, for each of ``ratios``, that share of as many samples added to them."""
    _check_set("real", *real)
    x, y = real
    if not ratios or min(ratios) < 0:
        raise ValueError(f"ratios is {tuple(ratios)}, allowed are shares of 0 or more")
    scores = {}
    for ratio in ratios:
        x_all, y_all = x, y
        if count := round(ratio * len(y)):
            more = draw_labels(y, count, generator=generator)
            x_all = torch.cat([x, sample_set(sampler, more, generator=generator).to(x)])
            y_all = torch.cat([y, more])
        scores[ratio] = score_classifier(train(x_all, y_all), *validation)
    return scores


def _check_set(name: str, x: Tensor, y: Tensor) -> None:
    if len(x) == 0 or y.ndim != 1 or len(x) != len(y) or y.is_floating_point() or int(y.min()) < 0:
        raise ValueError(
            f"{name} has {len(x)} images and labels of shape {tuple(y.shape)} and type {y.dtype}, needed are as many class indices"
        )


# Beside it: Frechet distance and Inception Score ----------------------------------------------------------------------


def feature_moments(features: ArrayLike) -> tuple[Float[np.ndarray, " d"], Float[np.ndarray, "d d"]]:
    """Mean and covariance (n - 1 in the denominator) of features (n, d), in float64."""
    F = np.asarray(features, dtype=np.float64)
    if F.ndim != 2 or len(F) < 2 or not np.isfinite(F).all():
        raise ValueError(f"features has shape {F.shape}, needed are finite numbers of two examples or more")
    return F.mean(axis=0), np.atleast_2d(np.cov(F, rowvar=False))


def frechet_distance(mean1: ArrayLike, covariance1: ArrayLike, mean2: ArrayLike, covariance2: ArrayLike) -> float:
    """||m1 - m2||^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), the squared Frechet distance of two Gaussians (FID).

    The trace of the root is taken from the symmetric L' C2 L, L L' = C1, which has the same eigenvalues as C1 C2: no
    root of a matrix that is not symmetric, no complex numbers, nothing to add to a singular diagonal.

    >>> frechet_distance([0.0], [[1.0]], [3.0], [[4.0]])
    10.0
    """
    m1, m2 = (np.asarray(mean, dtype=np.float64) for mean in (mean1, mean2))
    C1, C2 = (np.asarray(covariance, dtype=np.float64) for covariance in (covariance1, covariance2))
    if m1.ndim != 1 or m1.shape != m2.shape or not C1.shape == C2.shape == (len(m1), len(m1)):
        raise ValueError(
            f"means have shapes {m1.shape} and {m2.shape}, covariances {C1.shape} and {C2.shape}: (d,) and (d, d) are needed"
        )
    try:
        root = np.linalg.cholesky(C1)
    except np.linalg.LinAlgError:  # singular: fewer examples than features
        values, vectors = np.linalg.eigh(C1)
        root = vectors * np.sqrt(values.clip(min=0))
    cross = np.sqrt(np.linalg.eigvalsh(root.T @ C2 @ root).clip(min=0)).sum()
    return max(0.0, float(((m1 - m2) ** 2).sum() + np.trace(C1) + np.trace(C2) - 2 * cross))


def inception_score(probabilities: ArrayLike, *, splits: int = 1) -> float:
    """exp E[KL(p(y | x) || p(y))] of class probabilities (n, K); the mean over ``splits`` parts of the examples.

    >>> round(inception_score([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), 9)
    3.0
    """
    P = np.asarray(probabilities, dtype=np.float64)
    if P.ndim != 2 or not 1 <= splits <= len(P):
        raise ValueError(f"probabilities has shape {P.shape} and splits is {splits}, needed are 1 to n parts of (n, K)")
    if (P < 0).any() or (np.abs(P.sum(axis=1) - 1) > 1e-3).any():
        row = int(((P < 0).any(axis=1) | (np.abs(P.sum(axis=1) - 1) > 1e-3)).argmax())
        raise ValueError(f"probabilities row {row} sums to {P[row].sum():.6g}, needed are probabilities that sum to 1")
    scores = []
    for part in np.array_split(P, splits):
        marginal = part.mean(axis=0)
        scores.append(np.exp((xlogy(part, part) - xlogy(part, marginal)).sum(axis=1).mean()))
    return float(np.mean(scores))


def rank_correlation(cas: Mapping[str, float], distances: Mapping[str, float]) -> float:
    """Spearman's correlation of CAS with minus a distance over the generators: 1 where the distance ranks as CAS does.

    >>> rank_correlation({"a": 0.9, "b": 0.7, "c": 0.5}, {"a": 1.0, "b": 2.0, "c": 3.0})
    1.0
    """
    if cas.keys() != distances.keys() or len(cas) < 3:
        raise ValueError(
            f"cas has {sorted(cas)} and distances {sorted(distances)}, needed are the same three generators or more"
        )
    return float(spearmanr([cas[name] for name in cas], [-distances[name] for name in cas]).statistic)
