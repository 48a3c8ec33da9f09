"""Refined data augmentation: train with intensive augmentation, finish on clean data (arXiv 1909.09148)."""

from saigen.papers.augmentation.refined_augmentation.transform import (
    OnImages,
    RefinedAugmentation,
    Refinement,
    Risks,
    empirical_risks,
    freeze,
    major_feature_share,
    mixup_risk_floor,
    statistics_kept,
)

__all__ = [
    "OnImages",
    "RefinedAugmentation",
    "Refinement",
    "Risks",
    "empirical_risks",
    "freeze",
    "major_feature_share",
    "mixup_risk_floor",
    "statistics_kept",
]
