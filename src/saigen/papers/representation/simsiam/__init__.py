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
    simsiam_cifar_resnet18,
    simsiam_loss,
    simsiam_resnet50,
    spread_std,
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
    "simsiam_cifar_resnet18",
    "simsiam_loss",
    "simsiam_resnet50",
    "spread_std",
]
