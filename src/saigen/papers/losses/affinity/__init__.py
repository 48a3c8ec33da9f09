"""Affinity loss: max-margin classification by Gaussian affinity to equidistant centres (arXiv 1901.07711)."""

from saigen.papers.losses.affinity.loss import (
    AffinityHead,
    AffinityLoss,
    affinity_loss,
    diversity_regularizer,
    gaussian_affinity,
    max_margin_loss,
)

__all__ = [
    "AffinityHead",
    "AffinityLoss",
    "affinity_loss",
    "diversity_regularizer",
    "gaussian_affinity",
    "max_margin_loss",
]
