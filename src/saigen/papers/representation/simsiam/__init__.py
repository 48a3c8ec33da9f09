"""SimSiam (Chen & He, CVPR 2021)."""

from saigen.papers.representation.simsiam.model import (
    PredictionMLP,
    ProjectionMLP,
    SimSiam,
    SimSiamLoss,
    TwoViews,
    collapse_std,
    cross_entropy_similarity,
    knn_accuracy,
    linear_probe,
    negative_cosine,
    simsiam_loss,
)

__all__ = [
    "PredictionMLP",
    "ProjectionMLP",
    "SimSiam",
    "SimSiamLoss",
    "TwoViews",
    "collapse_std",
    "cross_entropy_similarity",
    "knn_accuracy",
    "linear_probe",
    "negative_cosine",
    "simsiam_loss",
]
