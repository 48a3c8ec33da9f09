"""The soft nearest neighbor loss: how entangled are the classes in a layer? (arXiv 1902.01889)."""

from saigen.papers.losses.soft_nearest_neighbor.loss import (
    DeepNeighbors,
    EntanglementRegularizer,
    LayerEntanglement,
    LayerTap,
    SoftNearestNeighborLoss,
    hidden_features,
    hidden_neighbor_credibility,
    inverse_temperature_step,
    layer_entanglement,
    optimal_temperature,
    pairwise_distance,
    real_fake_entanglement,
    soft_nearest_neighbor_loss,
)
from saigen.papers.losses.soft_nearest_neighbor.model import EntangledCNN, entangled_cnn

__all__ = [
    "DeepNeighbors",
    "EntangledCNN",
    "EntanglementRegularizer",
    "LayerEntanglement",
    "LayerTap",
    "SoftNearestNeighborLoss",
    "entangled_cnn",
    "hidden_features",
    "hidden_neighbor_credibility",
    "inverse_temperature_step",
    "layer_entanglement",
    "optimal_temperature",
    "pairwise_distance",
    "real_fake_entanglement",
    "soft_nearest_neighbor_loss",
]
